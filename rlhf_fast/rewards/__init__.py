"""What a policy is paid by."""
