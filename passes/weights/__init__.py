"""Passes that change weights: they act on a model, an exported program and in the backend."""
