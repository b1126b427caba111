"""Triton kernels of the forward pass of :mod:`effpass.lowering.ops.routed_attention`, arranged by blocks of keys.

    out[t, h] = Σ_i p[t, h, i] v[i]        p[t, h] = softmax_i(scale · q[t, h] · k[i])      i in the blocks t chose

`_attend` keeps some keys of one block in shared memory and processes a piece of the list of tokens that chose the block
(:mod:`effpass.lowering.kernels.routed_index`). The query heads of these tokens fill the rows of a matrix, so that
tensor cores are fully used whichever blocks tokens choose, and the time of a call depends only on lengths and budget.
The partial results of a token are stored for some thousand tokens at a time, in the dtype of v with the logarithms of
their sums in float32, and merged by `_merge`, as in MoBA (https://arxiv.org/abs/2502.13189). Scores and sums are
float32. Every sum has a fixed order, so that results are bitwise reproducible.

Shapes: T tokens, H query heads, G KV heads, K key size, V value size, P capacity of a token's list of blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effpass.lowering.kernels.routed_gradient import backward
from effpass.lowering.kernels.routed_index import Index, Items
from effpass.lowering.kernels.routed_rows import (
    Sizes,
    Tiling,
    item_of,
    options,
    parts_at,
    piece_size,
    rows_of,
    tiling,
    tokens_at_once,
)
from effpass.lowering.kernels.running_softmax import accumulate
from effpass.lowering.ops.routed_blocks import Blocks

__all__ = ["backward", "forward", "supported"]


def supported(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, scale: float) -> bool:
    """Return whether the kernels support q [T, H, K]: head sizes from 16 to 256, H / G up to 64, positive scale."""
    return (
        q.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and 16 <= q.shape[2] <= 256
        and 16 <= v.shape[2] <= 256
        and q.shape[1] // k.shape[1] <= 64
        and chosen.shape[1] * chosen.shape[2] < 1 << 31
        and scale > 0
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, chosen: Tensor, block: int, scale: float,
    how: Tiling | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run `effpass::routed_attention` on tensors that are :func:`supported`; `how` overrides the tiling."""
    (tokens, heads, _), groups, places = q.shape, k.shape[1], chosen.shape[2]
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    chosen, sizes, blocks = chosen.contiguous(), Sizes.of(q, k, v, block), Blocks.of(cu_seqlens, tokens, block)
    how = how or tiling("forward", sizes, q.element_size(), q.device)
    splits, step = how.splits(block), how.block_m // sizes.HEADS
    index = Index.of(chosen, blocks.start.shape[0])
    part = tokens_at_once(tokens, places * splits * heads * (sizes.VALUE * q.element_size() + 4))
    items = Items.of(index, part, piece_size(min(part, tokens), places, groups, step, q.device), tokens)
    waiting = v.new_empty((min(part, tokens), groups, places * splits, sizes.REPEAT, sizes.VALUE))
    sums = torch.empty(waiting.shape[:-1], dtype=torch.float32, device=q.device)
    out, logsumexp = v.new_empty((tokens, heads, sizes.VALUE)), q.new_empty((tokens, heads), dtype=torch.float32)
    of_merge = Tiling(max(32, sizes.HEADS), 0, 4, 1)
    for number, first in enumerate(range(0, tokens, part)):
        _attend[(splits, items.block.shape[2], groups)](
            q, k, v, blocks.start, blocks.stop, index.begin, index.tokens, index.ranks, *items[:3], waiting, sums,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], number, first, blocks.start.shape[0],
            index.tokens.shape[1], places, scale, **sizes._asdict(), PRODUCTS=how.products, BLOCK_M=how.block_m,
            BLOCK_N=how.block_n, **options(q.device, how),
        )  # fmt: skip
        rows = min(part, tokens - first)
        _merge[(triton.cdiv(rows, of_merge.block_m // sizes.HEADS), groups)](
            waiting, sums, chosen, out, logsumexp, first, first + rows, tokens, places, SPLITS=splits,
            REPEAT=sizes.REPEAT, HEADS=sizes.HEADS, VALUE=sizes.VALUE, BLOCK_V=sizes.BLOCK_V, BLOCK_M=of_merge.block_m,
            **options(q.device, of_merge),
        )  # fmt: skip
    return out, logsumexp


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _attended(q, token, k, v, key, stop, best, total, out, factor, MASKED: tl.constexpr):
    """Some keys into the running softmax of some rows."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    if MASKED:
        score = tl.where((key < stop)[None, :] & (key[None, :] <= token[:, None]), score, float("-inf"))
    return accumulate(score, v, best, total, out)


@triton.jit
def _visited(
    at, end, token, k, v, key, stop, query, listed, ranks, waiting, sums, query_t, query_h, from_token,
    split, splits, group, groups, places, factor, MASKED: tl.constexpr, REPEAT: tl.constexpr, HEADS: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRODUCTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What a program's keys give to BLOCK_M rows, and the tokens of the next rows.

    Tokens go from step to step, so that what stands at them can be on its way some steps before.
    """
    row, dk, dv = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    head, live = row % HEADS, (at + row // HEADS < end) & (row % HEADS < REPEAT)
    _, following, _, _ = rows_of(listed, at + BLOCK_M // HEADS, end, REPEAT, HEADS, BLOCK_M)
    of_query = token.to(tl.int64) * query_t + (group * REPEAT + head).to(tl.int64) * query_h
    q = tl.load(query + of_query[:, None] + dk[None, :], mask=live[:, None] & (dk < KEY)[None, :], other=0)
    rank = tl.load(ranks + at + row // HEADS, mask=live, other=0)
    best, total = tl.full([BLOCK_M], -1e30, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for i in tl.static_range(PRODUCTS):
        best, total, out = _attended(q, token, k[i], v[i], key + i * BLOCK_N, stop, best, total, out, factor, MASKED)
    place = ((token - from_token) * groups + group).to(tl.int64) * places + rank
    slot = (place * splits + split) * REPEAT + head
    out = out / tl.where(total > 0, total, 1)[:, None]
    tl.store(waiting + slot[:, None] * VALUE + dv[None, :], out.to(waiting.dtype.element_ty),
             mask=live[:, None] & (dv < VALUE)[None, :])  # fmt: skip
    tl.store(sums + slot, best + tl.log2(total), mask=live)
    return following


@triton.jit(do_not_specialize=["part", "from_token", "blocks", "entries", "places"])
def _attend(
    query, keys, values, starts, stops, list_begin, listed, ranks, item_blocks, firsts, ends, waiting, sums, query_t,
    query_h, keys_t, keys_h, values_t, values_h, part, from_token, blocks, entries, places, scale, REPEAT: tl.constexpr,
    HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, PRODUCTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A piece of one block's list, for PRODUCTS · BLOCK_N of its keys, which stay in shared memory."""
    split, group = tl.program_id(0), tl.program_id(2)
    splits, groups = tl.num_programs(0), tl.num_programs(2)
    block, first, end = item_of(item_blocks, firsts, ends, tl.program_id(1), tl.num_programs(1), part, group, groups)
    if first >= end:
        return
    start, stop = tl.load(starts + block), tl.load(stops + block)
    from_key = start + split * PRODUCTS * BLOCK_N
    key = from_key + tl.arange(0, BLOCK_N)
    keys += group.to(tl.int64) * keys_h
    values += group.to(tl.int64) * values_h
    k = parts_at(keys, from_key, stop, keys_t, KEY, PRODUCTS, BLOCK_N, BLOCK_K)
    v = parts_at(values, from_key, stop, values_t, VALUE, PRODUCTS, BLOCK_N, BLOCK_V)
    step: tl.constexpr = BLOCK_M // HEADS
    listed += group.to(tl.int64) * entries
    ranks += group.to(tl.int64) * entries
    factor = scale * 1.4426950408889634
    # Only the tokens that lie in the block, which come first in its list, are masked. If others follow, it is full.
    own = tl.load(list_begin + group * (blocks + 1) + block) + stop - start
    masked = first + tl.cdiv(tl.maximum(tl.minimum(own, end) - first, 0), step) * step
    _, token, _, _ = rows_of(listed, first, end, REPEAT, HEADS, BLOCK_M)
    for at in range(first, masked, step):
        token = _visited(
            at, end, token, k, v, key, stop, query, listed, ranks, waiting, sums, query_t, query_h,
            from_token, split, splits, group, groups, places, factor, True, REPEAT, HEADS, KEY, VALUE, BLOCK_K,
            BLOCK_V, PRODUCTS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    for at in range(masked, end, step):
        token = _visited(
            at, end, token, k, v, key, stop, query, listed, ranks, waiting, sums, query_t, query_h,
            from_token, split, splits, group, groups, places, factor, False, REPEAT, HEADS, KEY, VALUE, BLOCK_K,
            BLOCK_V, PRODUCTS, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["from_token", "to_token", "tokens", "places"])
def _merge(
    waiting, sums, chosen, out, logsumexp, from_token, to_token, tokens, places, SPLITS: tl.constexpr,
    REPEAT: tl.constexpr, HEADS: tl.constexpr, VALUE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What a token's blocks gave it, weighted by their sums."""
    group, groups, row = tl.program_id(1), tl.num_programs(1), tl.arange(0, BLOCK_M)
    token = from_token + tl.program_id(0) * (BLOCK_M // HEADS) + row // HEADS
    head, dv = row % HEADS, tl.arange(0, BLOCK_V)
    live = (token < to_token) & (head < REPEAT)
    of_list = (group.to(tl.int64) * tokens + token) * places
    of_slots = ((token - from_token) * groups + group).to(tl.int64) * places * SPLITS
    best, total = tl.full([BLOCK_M], -1e30, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    value = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    place = 0
    while place < places * SPLITS:
        there = tl.load(chosen + of_list + place // SPLITS, mask=live, other=-1) >= 0
        slot = (of_slots + place) * REPEAT + head
        found = tl.load(sums + slot, mask=there, other=float("-inf"))
        given = tl.load(
            waiting + slot[:, None] * VALUE + dv[None, :], mask=there[:, None] & (dv < VALUE)[None, :], other=0
        )
        higher = tl.maximum(best, found)
        fade, weight = tl.exp2(best - higher), tl.exp2(found - higher)
        total = total * fade + weight
        value = value * fade[:, None] + weight[:, None] * given.to(tl.float32)
        best = higher
        place = tl.where(tl.max(there.to(tl.int32), 0) > 0, place + 1, places * SPLITS)
    to = token.to(tl.int64) * (groups * REPEAT) + group * REPEAT + head
    value = value / tl.where(total > 0, total, 1)[:, None]
    tl.store(out + to[:, None] * VALUE + dv[None, :], value.to(out.dtype.element_ty),
             mask=live[:, None] & (dv < VALUE)[None, :])  # fmt: skip
    tl.store(logsumexp + to, (best + tl.log2(total)) * 0.6931471805599453, mask=live)
