"""Triton kernel of `effpass::choose_tree_blocks`: the blocks of a prefix that a token tree attends to.

    score of block b = Σ_h q_h · k̄_b      over the query heads h that share the KV head; k̄_b is the mean key

One program per sequence and KV head scores all blocks, in float32, and chooses among them
(:mod:`effpass.lowering.kernels.largest`); the first block and the last ones are always chosen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.largest import FORCED, NEVER, choose, in_order
from effpass.lowering.kernels.launch import launch_options, overlaps
from effpass.lowering.ops.tree_blocks import LAST, PARTS

__all__ = ["choose_tree_blocks", "supported"]

_MOST = 8192  # maximum number of blocks


def supported(query: Tensor, means: Tensor) -> bool:
    """Return whether the kernel applies: up to 8192 blocks, head sizes up to 256, one dtype."""
    return (
        query.dtype == means.dtype
        and query.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and means.shape[2] <= _MOST
        and means.shape[3] <= 256
        and means.stride(3) == 1
    )


def choose_tree_blocks(
    query: Tensor, means: Tensor, lengths: Tensor, most: int, block: int, dense_below: int, share: int
) -> Tensor:
    """Run `effpass::choose_tree_blocks` on tensors that are :func:`supported`."""
    (batch, heads, size), (_, groups, count, _), device = query.shape, means.shape, query.device
    query = query if query.stride(2) == 1 else query.contiguous()
    scores = torch.empty((batch * groups, count), dtype=torch.float32, device=device)
    chosen = torch.empty((batch, groups, most), dtype=torch.int32, device=device)
    _choose[(batch * groups,)](
        query, means, lengths, scores, chosen, *query.stride()[:2], *means.stride()[:3], count, most, dense_below,
        share, GROUPS=groups, REPEAT=heads // groups, SIZE=size, BLOCK=block,
        LAST=LAST, PARTS=PARTS, ALL=triton.next_power_of_2(max(count, most)), TILE=64,
        WIDTH=triton.next_power_of_2(size), PDL=overlaps(device), **launch_options(device, 8),
    )  # fmt: skip
    return chosen


@triton.jit(do_not_specialize=["count", "most", "dense_below", "share"])
def _choose(
    query, means, lengths, scores, chosen, query_b, query_h, means_b, means_h, means_n, count, most, dense_below, share,
    GROUPS: tl.constexpr, REPEAT: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr,
    PARTS: tl.constexpr, ALL: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    b, group = (head // GROUPS).to(tl.int64), head % GROUPS
    d, n = tl.arange(0, WIDTH), tl.arange(0, TILE)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    asked = tl.zeros([WIDTH], tl.float32)
    for repeat in range(REPEAT):
        of_head = query + b * query_b + (group * REPEAT + repeat) * query_h
        asked += tl.load(of_head + d, mask=d < SIZE, other=0).to(tl.float32)
    length = tl.load(lengths + b)
    blocks = tl.cdiv(length, BLOCK)
    scores += head.to(tl.int64) * count
    means += b * means_b + group * means_h
    for first in range(0, blocks, TILE):
        number = first + n
        there = (number < blocks)[:, None] & (d < SIZE)[None, :]
        mean = tl.load(means + number.to(tl.int64)[:, None] * means_n + d[None, :], mask=there, other=0)
        tl.store(scores + number, tl.sum(mean.to(tl.float32) * asked[None, :], 1), mask=number < blocks)
    tl.debug_barrier()  # scores written by other threads are read below
    every = tl.arange(0, ALL)
    score = tl.load(scores + every, mask=every < blocks, other=0)
    key = tl.where((every == 0) | (every >= blocks - LAST), FORCED, in_order(score))
    key = tl.where(every < blocks, key, NEVER)
    kept = tl.where(length <= dense_below, length, dense_below + ((length - dense_below).to(tl.int64) * share // PARTS))
    wanted = tl.minimum(tl.maximum(tl.cdiv(kept, BLOCK), 1 + LAST), most).to(tl.int32)
    is_chosen, rank, found = choose(key, wanted)
    chosen += head * most
    tl.store(chosen + rank, every, mask=is_chosen)
    tl.store(chosen + every, -1, mask=(every >= found) & (every < most))
