"""Rewards of a policy: reward models, functions, rules, URLs, and weighted sums of them."""
