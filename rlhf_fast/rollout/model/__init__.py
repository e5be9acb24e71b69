"""How a transformers model computes a step of generation."""
