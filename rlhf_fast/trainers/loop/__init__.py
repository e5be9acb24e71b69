"""Loop that all trainers share."""
