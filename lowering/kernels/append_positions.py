"""Kernel of `append_positions` for one token a row: a decode step has one of these and some hundred others."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.launch import launch_options, overlaps

__all__ = ["append_positions", "supported"]


def supported(positions: Tensor, new: Tensor) -> bool:
    """Whether there is a kernel: one token in each of up to 1024 rows."""
    return new.shape[1] == 1 and new.shape[0] <= 1024 and positions.stride(1) == 1


def append_positions(positions: Tensor, start: Tensor, filled: Tensor, new: Tensor) -> None:
    """`effpass::append_positions` where :func:`supported`."""
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
