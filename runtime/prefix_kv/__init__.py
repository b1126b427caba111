"""Caches with a budget: each layer keeps the tokens that matter most to it, in memory of that size."""
