"""Triton kernel of `effpass::append_positions` for one new token per sequence, as in a decode step.

    positions[b, filled] ← new[b];  start ← filled;  filled ← filled + 1

A single program of one warp handles the whole batch, one element per sequence. All tensors are int32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.launch import launch_options, overlaps

__all__ = ["append_positions", "supported"]


def supported(positions: Tensor, new: Tensor) -> bool:
    """Return whether the kernel applies: one token for each of up to 1024 sequences, slots contiguous."""
    return new.shape[1] == 1 and new.shape[0] <= 1024 and positions.stride(1) == 1


def append_positions(positions: Tensor, start: Tensor, filled: Tensor, new: Tensor) -> None:
    """Run `effpass::append_positions` on tensors that are :func:`supported`."""
    rows, device = new.shape[0], new.device
    _append[(1,)](
        positions, start, filled, new, rows, positions.stride(0), new.stride(0),
        BLOCK=triton.next_power_of_2(rows), PDL=overlaps(device), **launch_options(device, 1),
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _append(
    positions, start, filled, new, rows, stride_of_row, stride_of_new, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.arange(0, BLOCK)
    slot = tl.load(filled)
    position = tl.load(new + row * stride_of_new, mask=row < rows)
    tl.store(positions + row * stride_of_row + slot, position, mask=row < rows)
    tl.store(start, slot)
    tl.store(filled, slot + 1)
