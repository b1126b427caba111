"""Passes that change weights. They act on a model; most also act on a program and in the `torch.compile` backend."""
