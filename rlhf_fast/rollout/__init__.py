"""Rollouts: sampling responses from a policy, with their log-probabilities."""
