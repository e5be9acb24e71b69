"""Predict what a run takes before it begins: memory, hours and dollars."""
