"""Kernels of :mod:`effpass.lowering.ops.routed_attention`: blocks of keys visit the tokens that chose them.

A program takes some tokens from the list of one block, whose query heads fill the rows of a matrix, and attends to that
block alone. So tensor cores are full whatever tokens chose, and lengths and budget alone tell how long a call takes.
What blocks give to a token waits in memory, some thousand tokens at a time, and is merged by the logarithms of its
sums, as in MoBA (https://arxiv.org/abs/2502.13189). Every sum has one order: results are the same bits each time.

Shapes: T tokens, H query heads, G key-value heads, K key size, V value size, P places of a token's list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effpass.lowering.kernels.routed_gradient import backward
from effpass.lowering.kernels.routed_index import Index, Items
from effpass.lowering.kernels.routed_rows import (
    Described,
    Sizes,
    Tiling,
    item_of,
    options,
    rows_of,
    tiling,
    tokens_at_once,
)
from effpass.lowering.kernels.running_softmax import accumulate
from effpass.lowering.ops.routed_blocks import Blocks

__all__ = ["backward", "forward", "supported"]


def supported(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, scale: float) -> bool:
    """Whether there are kernels for q [T, H, K]: heads up to 256, and up to 64 of them to one of keys."""
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
    """`effpass::routed_attention` where :func:`supported`; `how` in place of the tiling that is used."""
    (tokens, heads, _), groups, places = q.shape, k.shape[1], chosen.shape[2]
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    chosen, sizes, blocks = chosen.contiguous(), Sizes.of(q, k, v, block), Blocks.of(cu_seqlens, tokens, block)
    how = how or tiling("forward", sizes, q.element_size())
    count = blocks.start.shape[0]
    index = Index.of(chosen, count)
    part = tokens_at_once(tokens, places * heads * (sizes.VALUE * q.element_size() + 4))
    items = Items.of(index, part, how.block_m // sizes.HEADS, tokens)
    waiting = v.new_empty((min(part, tokens), groups, places, sizes.REPEAT, sizes.VALUE))
    sums = torch.empty(waiting.shape[:-1], dtype=torch.float32, device=q.device)
    out, logsumexp = v.new_empty((tokens, heads, sizes.VALUE)), q.new_empty((tokens, heads), dtype=torch.float32)
    of_keys = Described.rows(k, how.block_n, sizes.BLOCK_K, how.has_descriptors)
    of_values = Described.rows(v, how.block_n, sizes.BLOCK_V, how.has_descriptors)
    for number, first in enumerate(range(0, tokens, part)):
        _attend[(items.block.shape[2], groups)](
            q, k, v, of_keys.of, of_values.of, blocks.start, blocks.stop, index.begin, index.tokens, index.ranks,
            *items[:3], waiting, sums, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *of_keys[1:], *of_values[1:],
            number, first, count, index.tokens.shape[1], places, scale, **sizes._asdict(),
            DESCRIBED=of_keys.of is not None and of_values.of is not None, BLOCK_M=how.block_m, BLOCK_N=how.block_n,
            **options(q.device, how),
        )  # fmt: skip
        rows = min(part, tokens - first)
        of_merge = Tiling(max(32, sizes.HEADS), 0, 4, 1)
        _merge[(triton.cdiv(rows, of_merge.block_m // sizes.HEADS), groups)](
            waiting, sums, chosen, out, logsumexp, first, first + rows, tokens, places, REPEAT=sizes.REPEAT,
            HEADS=sizes.HEADS, VALUE=sizes.VALUE, BLOCK_V=sizes.BLOCK_V, BLOCK_M=of_merge.block_m,
            **options(q.device, of_merge),
        )  # fmt: skip
    return out, logsumexp


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["keys_row", "keys_column", "values_row", "values_column", "part", "from_token", "blocks",
                       "entries", "places"]
)  # fmt: skip
def _attend(
    query, keys, values, of_keys, of_values, starts, stops, list_begin, listed, ranks, item_blocks, firsts, ends,
    waiting, sums, query_t, query_h, keys_t, keys_h, values_t, values_h, keys_row, keys_column, values_row,
    values_column, part, from_token, blocks, entries, places, scale, REPEAT: tl.constexpr, HEADS: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DESCRIBED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys and some of the tokens that chose it."""
    group, groups = tl.program_id(1), tl.num_programs(1)
    block, first, end = item_of(item_blocks, firsts, ends, tl.program_id(0), tl.num_programs(0), part, group, groups)
    if first >= end:
        return
    start, stop = tl.load(starts + block), tl.load(stops + block)
    dk, dv, span = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    listed += group.to(tl.int64) * entries
    at, token, head, live = rows_of(listed, first, end, REPEAT, HEADS, BLOCK_M)
    rank = tl.load(ranks + group.to(tl.int64) * entries + at, mask=live, other=0)
    of_query = token.to(tl.int64) * query_t + (group * REPEAT + head).to(tl.int64) * query_h
    q = tl.load(query + of_query[:, None] + dk[None, :], mask=live[:, None] & (dk < KEY)[None, :], other=0)
    keys += group.to(tl.int64) * keys_h
    values += group.to(tl.int64) * values_h
    factor = scale * 1.4426950408889634
    best, total = tl.full([BLOCK_M], -1e30, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    # The tokens of the block itself stand first in its list, and all others see every key: then the block is full.
    whole = tl.where(first < tl.load(list_begin + group * (blocks + 1) + block) + stop - start, 0, BLOCK)
    for i in range(0, whole, BLOCK_N):
        if DESCRIBED:
            k = tl.trans(of_keys.load([start + i + group * keys_row, group * keys_column]))
            v = of_values.load([start + i + group * values_row, group * values_column])
        else:
            row = (start + i + span).to(tl.int64)
            at_k, at_v = keys + row[None, :] * keys_t + dk[:, None], values + row[:, None] * values_t + dv[None, :]
            k = tl.load(at_k) if KEY == BLOCK_K else tl.load(at_k, mask=(dk < KEY)[:, None], other=0)
            v = tl.load(at_v) if VALUE == BLOCK_V else tl.load(at_v, mask=(dv < VALUE)[None, :], other=0)
        score = tl.dot(q, k, input_precision="ieee") * factor
        best, total, out = accumulate(score, v, best, total, out)
    for i in range(whole, stop - start, BLOCK_N):
        key = start + i + span
        inside, row = key < stop, key.to(tl.int64)
        at_k, at_v = keys + row[None, :] * keys_t + dk[:, None], values + row[:, None] * values_t + dv[None, :]
        k = tl.load(at_k, mask=inside[None, :] & (dk < KEY)[:, None], other=0)
        v = tl.load(at_v, mask=inside[:, None] & (dv < VALUE)[None, :], other=0)
        score = tl.dot(q, k, input_precision="ieee") * factor
        score = tl.where(inside[None, :] & (key[None, :] <= token[:, None]), score, float("-inf"))
        best, total, out = accumulate(score, v, best, total, out)
    slot = ((((token - from_token) * groups + group).to(tl.int64) * places) + rank) * REPEAT + head
    kept = live[:, None] & (dv < VALUE)[None, :]
    out = out / tl.where(total > 0, total, 1)[:, None]
    tl.store(waiting + slot[:, None] * VALUE + dv[None, :], out.to(waiting.dtype.element_ty), mask=kept)
    tl.store(sums + slot, best + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=["from_token", "to_token", "tokens", "places"])
def _merge(
    waiting, sums, chosen, out, logsumexp, from_token, to_token, tokens, places, REPEAT: tl.constexpr,
    HEADS: tl.constexpr, VALUE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What a token's blocks gave it, weighted by their sums."""
    group, groups, row = tl.program_id(1), tl.num_programs(1), tl.arange(0, BLOCK_M)
    token = from_token + tl.program_id(0) * (BLOCK_M // HEADS) + row // HEADS
    head, dv = row % HEADS, tl.arange(0, BLOCK_V)
    live = (token < to_token) & (head < REPEAT)
    of_list = (group.to(tl.int64) * tokens + token) * places
    of_slots = ((token - from_token) * groups + group).to(tl.int64) * places
    best, total = tl.full([BLOCK_M], -1e30, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    value = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    place = 0
    while place < places:
        there = tl.load(chosen + of_list + place, mask=live, other=-1) >= 0
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
        place = tl.where(tl.max(there.to(tl.int32), 0) > 0, place + 1, places)
    to = token.to(tl.int64) * (groups * REPEAT) + group * REPEAT + head
    value = value / tl.where(total > 0, total, 1)[:, None]
    tl.store(out + to[:, None] * VALUE + dv[None, :], value.to(out.dtype.element_ty),
             mask=live[:, None] & (dv < VALUE)[None, :])  # fmt: skip
    tl.store(logsumexp + to, (best + tl.log2(total)) * 0.6931471805599453, mask=live)
