"""The `effpass::` operators, which passes and the decode engine insert into models.

Each module defines one operator, or a few that belong together. Its docstring states the equation; beside the operator
stand the reference implementation in PyTorch (which also runs where no GPU kernel applies), the fake implementation
that gives shapes and dtypes during tracing, the gradients if it has any, the FLOP formula, and the tolerance within
which kernels of :mod:`effpass.lowering.kernels` match the reference. The remaining modules hold what operators share:
cost models, kernel choice and packing.

Importing a module of this package registers its operators as `torch.ops.effpass.*`.
"""
