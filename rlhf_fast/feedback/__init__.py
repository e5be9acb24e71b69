"""Feedback: comparisons of responses, by people or by a simulated annotator that says so."""
