"""Triton kernels: providers for the operators."""
