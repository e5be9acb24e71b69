"""Measure what a trained model is worth: paired scores with intervals, texts that repeat themselves, a page to read."""
