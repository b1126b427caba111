"""Lowering of programs: `effpass::` operators, their GPU kernels, and the targets that programs are compiled for."""
