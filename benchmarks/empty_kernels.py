"""Kernels that do nothing but start, or wait for each other."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["barriers", "nothing"]


@triton.jit
def nothing(x):
    gdc_launch_dependents()
    gdc_wait()
    tl.store(x + tl.program_id(0), 1.0)


@triton.jit
def barriers(arrived, x, COUNT: tl.constexpr):
    """All programs, which run at once, wait for each other `COUNT` times; `arrived` begins at zero."""
    programs = tl.num_programs(0)
    for step in range(COUNT):
        tl.debug_barrier()
        tl.atomic_add(arrived, 1, sem="release")
        while tl.atomic_add(arrived, 0, sem="acquire") < programs * (step + 1):
            pass
    tl.store(x + tl.program_id(0), 1.0)
