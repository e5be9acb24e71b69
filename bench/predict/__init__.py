"""Predict what every op takes on GPUs that nobody here has, written down before one is seen; see __main__.py."""
