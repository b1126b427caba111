"""Triton kernels around the grouped products of experts: sorting pairs by expert, and summing a token's outputs.

`_route` sorts the pairs of a token and an expert by expert, stably and without a sorting algorithm, with one program
per expert: the offset of an expert's pairs is the number of smaller ids, so that each program finds its offset by
itself. `_combine` computes the weighted sum of a token's outputs in float32, in the order in which the token lists its
experts, with one program per token and up to 1024 columns, and rounds once. Each is one kernel launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.launch import launch_options, overlaps

__all__ = ["combine", "route"]


def route(experts: Tensor, count: int, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sort pairs by expert, leaving out those of experts that are not local.

    Args:
        experts: int [T, k], contiguous; ids of `count` or more are not local.
        count: number of local experts.
        places: int32 [T·k], position of each pair in `order`; written, undefined for pairs without a local expert. None
            if not needed.

    Returns:
        order: int32 [T·k], pairs in sorted order, followed by undefined entries; pair p belongs to token p // k.
        starts: int32 [count + 1], offset of each expert's pairs in `order`, followed by their number.
    """
    pairs = experts.numel()
    order = experts.new_empty(pairs, dtype=torch.int32)
    starts = experts.new_empty(count + 1, dtype=torch.int32)
    block = min(max(128, triton.next_power_of_2(pairs)), 4096)
    options = launch_options(experts.device, 4 if block <= 1024 else 8)
    pdl = overlaps(experts.device)
    _route[(count,)](experts, order, starts, places, pairs, BLOCK=block, PDL=pdl, **options)
    return order, starts


def combine(
    outputs: Tensor, experts: Tensor, weights: Tensor, count: int, out: Tensor, places: Tensor | None = None
) -> Tensor:
    """Compute out[t] = Σ_j weights[t, j] · outputs[t, j] over the local experts of each token; returns `out`.

    Args:
        outputs: [T·k, D], output of each pair; undefined for experts that are not local.
        experts: int [T, k].
        weights: [T, k], router weights.
        count: number of local experts.
        out: [T, D], written.
        places: int32 [T·k], row of `outputs` of each pair; None if pairs are in their original order.
    """
    (tokens, width), each = out.shape, experts.shape[1]
    block = min(triton.next_power_of_2(width), 1024)
    options = launch_options(out.device, max(1, block // 256))
    _combine[(triton.cdiv(width, block), tokens)](
        outputs, experts, weights, places, out, COUNT=count, WIDTH=width, EACH=each, BLOCK=block,
        PDL=overlaps(out.device), **options,
    )  # fmt: skip
    return out


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["pairs"])
def _route(experts, order, starts, places, pairs, BLOCK: tl.constexpr, PDL: tl.constexpr):
    expert, span = tl.program_id(0), tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    smaller = tl.zeros([BLOCK], tl.int32)
    for first in range(0, pairs, BLOCK):
        ids = tl.load(experts + first + span, mask=first + span < pairs, other=2147483647)
        smaller += (ids < expert).to(tl.int32)
    place = tl.sum(smaller, 0)
    tl.store(starts + expert, place)
    for first in range(0, pairs, BLOCK):
        ids = tl.load(experts + first + span, mask=first + span < pairs, other=2147483647)
        mine = (ids == expert).to(tl.int32)
        row = place + tl.cumsum(mine, 0) - 1
        tl.store(order + row, first + span, mask=mine == 1)
        if places is not None:
            tl.store(places + first + span, row, mask=mine == 1)
        place += tl.sum(mine, 0)
    if expert == tl.num_programs(0) - 1:
        tl.store(starts + expert + 1, place)


@triton.jit
def _combine(
    outputs, experts, weights, places, out, COUNT: tl.constexpr, WIDTH: tl.constexpr, EACH: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n, token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(EACH):
        here = tl.load(experts + token * EACH + j) < COUNT
        weight = tl.load(weights + token * EACH + j).to(tl.float32)
        row = token * EACH + j
        if places is not None:
            row = tl.load(places + row, mask=here, other=0)
        value = tl.load(outputs + row.to(tl.int64) * WIDTH + n, mask=(n < WIDTH) & here, other=0).to(tl.float32)
        total += tl.where(here, value * weight, 0)
    tl.store(out + token.to(tl.int64) * WIDTH + n, total.to(out.dtype.element_ty), mask=n < WIDTH)
