"""Trainers that learn what the passes apply."""
