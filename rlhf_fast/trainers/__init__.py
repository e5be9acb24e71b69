"""Trainers: one loop (loop.py), and a small file for each method on it."""
