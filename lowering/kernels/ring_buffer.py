"""Triton kernels of `effpass::write_ring` and `effpass::read_ring`.

One program copies up to 1024 numbers of one row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.launch import launch_options, overlaps

__all__ = ["read_ring", "write_ring"]

_MOST = 1024  # numbers of a row that one program copies


def write_ring(ring: Tensor, rows: Tensor, path: Tensor, end: Tensor, taken: Tensor) -> None:
    """Run `effpass::write_ring`; the last dimensions of `ring`, `rows` and `path` must be contiguous."""
    (batch, size, width), steps, device = ring.shape, path.shape[1], ring.device
    block = min(_MOST, triton.next_power_of_2(width))
    _write[(batch, steps, triton.cdiv(width, block))](
        ring, rows, path, end, taken, *ring.stride()[:2], *rows.stride()[:2], path.stride(0), size, WIDTH=width,
        BLOCK=block, PDL=overlaps(device), **launch_options(device, 4),
    )  # fmt: skip


def read_ring(ring: Tensor, first: Tensor, offset: int, width: int) -> Tensor:
    """Run `effpass::read_ring`; the last dimension of `ring` must be contiguous."""
    (batch, size, numbers), device = ring.shape, ring.device
    out = ring.new_empty((batch, width, numbers))
    block = min(_MOST, triton.next_power_of_2(numbers))
    _read[(batch, width, triton.cdiv(numbers, block))](
        ring, first, out, *ring.stride()[:2], offset, size, WIDTH=numbers, BLOCK=block, PDL=overlaps(device),
        **launch_options(device, 4),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["size"])
def _write(
    ring, rows, path, end, taken, ring_b, ring_r, rows_b, rows_n, path_b, size, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b, step = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    many = tl.load(taken + b)
    if step < many:
        place = (tl.load(end + b) - many + step) % size
        node = tl.load(path + b * path_b + step)
        row = tl.load(rows + b * rows_b + node * rows_n + d, mask=d < WIDTH)
        tl.store(ring + b * ring_b + place * ring_r + d, row, mask=d < WIDTH)


@triton.jit(do_not_specialize=["offset", "size"])
def _read(
    ring, first, out, ring_b, ring_r, offset, size, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    b, step = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    place = (tl.load(first + b) + offset + step) % size
    place = tl.where(place < 0, place + size, place)  # the remainder has the sign of the dividend
    row = tl.load(ring + b * ring_b + place * ring_r + d, mask=d < WIDTH)
    tl.store(out + (b * tl.num_programs(1) + step) * WIDTH + d, row, mask=d < WIDTH)
