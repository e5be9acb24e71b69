"""Rewards of a policy."""
