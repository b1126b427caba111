"""A kernel that reads a buffer and does little else, to measure the bandwidth of a GPU's memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["BLOCK", "read"]

#: Elements that one program reads: 16 KiB, of which each of 256 threads loads four times 128 bits.
BLOCK = 4096


@triton.jit
def _read(x, largest, COUNT: tl.constexpr):
    program = tl.program_id(0)
    values = tl.load(x + program.to(tl.int64) * COUNT + tl.arange(0, COUNT))
    tl.store(largest + program, tl.max(values, axis=0))


def read(x: Tensor, largest: Tensor) -> None:
    """Read x [N] of four bytes an element, N a multiple of :data:`BLOCK`; `largest` gets the maximum of each block."""
    _read[(x.numel() // BLOCK,)](x, largest, BLOCK, num_warps=8)
