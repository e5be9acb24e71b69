"""Trainers: what they share (loop/), a small file for each method on it, and PPO (ppo/)."""
