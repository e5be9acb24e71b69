"""Compute a step of generation by a model of transformers."""
