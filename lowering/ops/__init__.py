"""Operators: reference, fake, autograd, FLOP formula and tolerance of each.

Importing a module of this package registers its operators as `torch.ops.effpass.*`.
"""
