"""Rows of ring buffers: a draft's features, of which a few rows are written and read per round, in one launch each.

    write   ring[b, (end[b] − taken[b] + j) mod R] ← rows[b, path[b, j]]     for j < taken[b]
    read    out[b, j] ← ring[b, (first[b] + offset + j) mod R]

:class:`~effpass.runtime.speculative.progress.Progress` has such a buffer, and an EAGLE-3 head reads it.

Shapes: B sequences, R rows of the ring buffer, D width, N nodes, J nodes of the longest path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.core.errors import EffpassError
from effpass.lowering.ops.kernel_choice import triton_kernels

__all__ = ["read_ring", "write_ring"]


def _write_ring(ring: Tensor, rows: Tensor, path: Tensor, end: Tensor, taken: Tensor) -> None:
    step = torch.arange(path.shape[1], device=path.device)
    place = (((end - taken)[:, None] + step) % ring.shape[1])[:, :, None].expand(-1, -1, ring.shape[2])
    new = rows.gather(1, path[:, :, None].expand(-1, -1, rows.shape[2])).to(ring.dtype)
    there = (step < taken[:, None])[:, :, None]
    ring.scatter_(1, place, torch.where(there, new, ring.gather(1, place)))


@torch.library.custom_op(
    "effpass::write_ring",
    mutates_args=("ring",),
    schema="(Tensor(a!) ring, Tensor rows, Tensor path, Tensor end, Tensor taken) -> ()",
)
def write_ring(ring: Tensor, rows: Tensor, path: Tensor, end: Tensor, taken: Tensor) -> None:
    """Write the first rows of a path to a ring buffer. The host does not wait for the device.

    Args:
        ring: [B, R, D], written.
        rows: [B, N, D], rows of all nodes.
        path: int64 [B, J] with J ≤ R, nodes in order.
        end: int64 [B], place after the last row that is written.
        taken: int64 [B], number of nodes of `path` to write.

    Raises:
        EffpassError: if a path has more nodes than the ring buffer has rows.
    """
    _check(ring, path.shape[1])
    _write_ring(ring, rows, path, end, taken)


@write_ring.register_fake
def _(ring, rows, path, end, taken):  # type: ignore[no-untyped-def]
    _check(ring, path.shape[1])


@write_ring.register_kernel("cuda")
def _(ring, rows, path, end, taken):  # type: ignore[no-untyped-def]
    _check(ring, path.shape[1])
    kernels = triton_kernels("ring_buffer")
    if kernels and ring.stride(2) == rows.stride(2) == path.stride(1) == 1:
        kernels.write_ring(ring, rows, path, end, taken)
    else:
        _write_ring(ring, rows, path, end, taken)


def _read_ring(ring: Tensor, first: Tensor, offset: int, width: int) -> Tensor:
    place = (first[:, None] + offset + torch.arange(width, device=ring.device)) % ring.shape[1]
    return ring.gather(1, place[:, :, None].expand(-1, -1, ring.shape[2]))


@torch.library.custom_op("effpass::read_ring", mutates_args=())
def read_ring(ring: Tensor, first: Tensor, offset: int, width: int) -> Tensor:
    """Return consecutive rows `[B, width, D]` of a ring buffer. The host does not wait for the device.

    Args:
        ring: [B, R, D].
        first: int64 [B].
        offset: `first + offset` is the place of the first row, which may be negative.
        width: number of rows to read from each sequence.
    """
    return _read_ring(ring, first, offset, width)


@read_ring.register_fake
def _(ring, first, offset, width):  # type: ignore[no-untyped-def]
    return ring.new_empty((ring.shape[0], width, ring.shape[2]))


@read_ring.register_kernel("cuda")
def _(ring, first, offset, width):  # type: ignore[no-untyped-def]
    kernels = triton_kernels("ring_buffer")
    return (kernels.read_ring if kernels and ring.stride(2) == 1 else _read_ring)(ring, first, offset, width)


def _check(ring: Tensor, steps: int) -> None:
    if steps > ring.shape[1]:
        raise EffpassError(f"a path of {steps} nodes does not fit a ring buffer of {ring.shape[1]} rows")


for _op in (torch.ops.effpass.write_ring, torch.ops.effpass.read_ring):

    @register_flop_formula(_op)
    def _(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return 0
