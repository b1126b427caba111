"""Triton kernels of the `effpass::` operators; each module implements operators of :mod:`effpass.lowering.ops`."""
