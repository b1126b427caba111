"""Caches and the decode loop."""
