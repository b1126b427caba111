"""Operators: reference, fake, autograd, FLOP formula and tolerance of each."""
