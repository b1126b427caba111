"""Passes that change the graph: they act on a program and in the backend."""
