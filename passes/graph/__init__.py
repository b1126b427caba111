"""Passes that change the graph. They act on a program of `torch.export` and in the `torch.compile` backend."""
