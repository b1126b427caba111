"""Triton kernels of the backward pass of :mod:`effpass.lowering.ops.routed_attention`, which recompute the scores.

    δ = Σ dout · out     dp = dout vᵀ     ds = scale · p (dp − δ)     dq = ds k     dk = dsᵀ q     dv = pᵀ dout

For queries, the contributions of each block to a token are stored, in the dtype of q, and added in the order of the
token's list, as in the forward pass. For keys and values, a program processes the list of tokens of one block; a list
that is much longer than others, like that of a sequence's first block, is cut into pieces, whose float32 sums are added
by another kernel. The scores are thus computed twice, with 7 matrix products instead of 5, but no program adds to the
results of another one and there are no atomics. Products accumulate in float32; p and ds are rounded to the dtype of
the inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effpass.lowering.kernels.routed_index import TILE, Index, Items
from effpass.lowering.kernels.routed_rows import (
    Sizes,
    Tiling,
    item_of,
    keys_at,
    options,
    parts_at,
    piece_size,
    rows_of,
    tiling,
    tokens_at_once,
)
from effpass.lowering.ops.routed_blocks import Blocks

__all__ = ["backward"]


def backward(
    d_output: Tensor, output: Tensor, logsumexp: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor,
    chosen: Tensor, block: int, scale: float, of_query: Tiling | None = None, of_key: Tiling | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run `effpass::routed_attention_backward` for an input that the forward kernels support.

    `of_query` and `of_key` override the tilings of the two kernels.
    """
    tokens = q.shape[0]
    q, k, v, d_output = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v, d_output))
    chosen, sizes, blocks = chosen.contiguous(), Sizes.of(q, k, v, block), Blocks.of(cu_seqlens, tokens, block)
    index = Index.of(chosen, blocks.start.shape[0])
    delta, rows = torch.empty_like(logsumexp), logsumexp.numel()
    of_delta = Tiling(32, 0, 4, 1)
    _delta[(triton.cdiv(rows, of_delta.block_m),)](
        output.contiguous(), d_output, delta, *d_output.stride()[:2], rows, q.shape[1], VALUE=sizes.VALUE,
        BLOCK_V=sizes.BLOCK_V, BLOCK_M=of_delta.block_m, **options(q.device, of_delta),
    )  # fmt: skip
    saved = (q, k, v, d_output, logsumexp.contiguous(), delta)
    d_q = _of_query(saved, chosen, index, blocks, sizes, scale, of_query)
    return d_q, *_of_key(saved, chosen.shape[2], index, blocks, sizes, scale, of_key)


def _of_query(
    saved: tuple[Tensor, ...], chosen: Tensor, index: Index, blocks: Blocks, sizes: Sizes, scale: float,
    how: Tiling | None,
) -> Tensor:  # fmt: skip
    q, k, *_ = saved
    (tokens, heads, _), groups, places = q.shape, k.shape[1], chosen.shape[2]
    how = how or tiling("query", sizes, q.element_size(), q.device)
    splits, step = how.splits(sizes.BLOCK), how.block_m // sizes.HEADS
    part = tokens_at_once(tokens, places * splits * heads * sizes.KEY * q.element_size())
    items = Items.of(index, part, piece_size(min(part, tokens), places, groups, step, q.device), tokens)
    waiting = q.new_empty((min(part, tokens), groups, places * splits, sizes.REPEAT, sizes.KEY))
    d_q = q.new_empty(q.shape)
    of_sum = Tiling(max(32, sizes.HEADS), 0, 4, 1)
    for number, first in enumerate(range(0, tokens, part)):
        _query_gradient[(splits, items.block.shape[2], groups)](
            *saved, blocks.start, blocks.stop, index.begin, index.tokens, index.ranks, *items[:3], waiting,
            *(n for x in saved[:4] for n in x.stride()[:2]), number, first, index.begin.shape[1] - 1,
            index.tokens.shape[1], places, scale, **sizes._asdict(), PRODUCTS=how.products, BLOCK_M=how.block_m,
            BLOCK_N=how.block_n, **options(q.device, how),
        )  # fmt: skip
        rows = min(part, tokens - first)
        _sum[(triton.cdiv(rows, of_sum.block_m // sizes.HEADS), groups)](
            waiting, chosen, d_q, first, first + rows, tokens, places, scale, SPLITS=splits, REPEAT=sizes.REPEAT,
            HEADS=sizes.HEADS, KEY=sizes.KEY, BLOCK_K=sizes.BLOCK_K, BLOCK_M=of_sum.block_m,
            **options(q.device, of_sum),
        )  # fmt: skip
    return d_q


def _of_key(
    saved: tuple[Tensor, ...], places: int, index: Index, blocks: Blocks, sizes: Sizes, scale: float,
    how: Tiling | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v, *_ = saved
    tokens, groups = k.shape[:2]
    how = how or tiling("key", sizes, q.element_size(), q.device)
    size = piece_size(tokens, places, groups, how.block_m // sizes.HEADS, q.device)
    items = Items.of(index, triton.cdiv(tokens, TILE) * TILE, size, tokens)
    pieces, count = items.block.shape[2], index.begin.shape[1] - 1
    parts = [
        torch.empty((groups, pieces, sizes.BLOCK, n), dtype=torch.float32, device=q.device)
        for n in (sizes.KEY, sizes.VALUE)
    ]
    _key_gradient[(sizes.BLOCK // how.block_n, pieces, groups)](
        *saved, blocks.start, blocks.stop, index.begin, index.tokens, *items[:3], *parts,
        *(n for x in saved[:4] for n in x.stride()[:2]), count, index.tokens.shape[1], scale, **sizes._asdict(),
        BLOCK_M=how.block_m, BLOCK_N=how.block_n, **options(q.device, how),
    )  # fmt: skip
    d_k, d_v = (x.new_empty(x.shape) for x in (k, v))
    of_sum = Tiling(min(32, sizes.BLOCK), 0, 4, 1)
    for part, found, width, factor in ((parts[0], d_k, sizes.BLOCK_K, scale), (parts[1], d_v, sizes.BLOCK_V, 1.0)):
        _add_pieces[(count, sizes.BLOCK // of_sum.block_m, groups)](
            part, found, blocks.start, blocks.stop, items.before, items.counts, pieces, factor,
            SIZE=found.shape[2], BLOCK=sizes.BLOCK, BLOCK_SIZE=width, BLOCK_M=of_sum.block_m,
            **options(q.device, of_sum),
        )  # fmt: skip
    return d_k, d_v


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _delta(output, d_output, delta, d_t, d_h, rows, heads, VALUE: tl.constexpr, BLOCK_V: tl.constexpr,
           BLOCK_M: tl.constexpr):  # fmt: skip
    row, dv = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    kept = (row < rows)[:, None] & (dv < VALUE)[None, :]
    out = tl.load(output + row.to(tl.int64)[:, None] * VALUE + dv[None, :], mask=kept, other=0)
    at = (row // heads).to(tl.int64) * d_t + (row % heads).to(tl.int64) * d_h
    d_out = tl.load(d_output + at[:, None] + dv[None, :], mask=kept, other=0)
    tl.store(delta + row, tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1), mask=row < rows)


@triton.jit
def _rows(
    at, end, token, query, d_output, logsumexp, delta, query_t, query_h, d_t, d_h, group, heads, REPEAT: tl.constexpr,
    HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Head and existence of rows, q, dout, log of the sum in powers of two (infinity where there is no row), and δ."""
    row, dk, dv = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    head, live = row % HEADS, (at + row // HEADS < end) & (row % HEADS < REPEAT)
    of_head, of_token = (group * REPEAT + head).to(tl.int64), token.to(tl.int64)
    at_q = query + (of_token * query_t + of_head * query_h)[:, None] + dk[None, :]
    q = tl.load(at_q, mask=live[:, None] & (dk < KEY)[None, :], other=0)
    at_d = d_output + (of_token * d_t + of_head * d_h)[:, None] + dv[None, :]
    d_out = tl.load(at_d, mask=live[:, None] & (dv < VALUE)[None, :], other=0)
    of_row = of_token * heads + of_head
    of_sum = tl.load(logsumexp + of_row, mask=live, other=float("inf")) * 1.4426950408889634
    return head, live, q, d_out, of_sum, tl.load(delta + of_row, mask=live, other=0)


@triton.jit
def _added(q, d_out, of_sum, of_delta, token, k, v, key, stop, d_q, factor, MASKED: tl.constexpr):
    """`d_q` and ds k of some keys."""
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * factor - of_sum[:, None])
    if MASKED:
        p = tl.where((key < stop)[None, :] & (key[None, :] <= token[:, None]), p, 0)
    d_p = tl.dot(d_out, tl.trans(v), input_precision="ieee")
    return tl.dot((p * (d_p - of_delta[:, None])).to(k.dtype), k, d_q, input_precision="ieee")


@triton.jit
def _given(
    at, end, token, k, v, key, stop, query, d_output, logsumexp, delta, listed, ranks, waiting, query_t,
    query_h, d_t, d_h, from_token, split, splits, group, groups, places, factor, MASKED: tl.constexpr,
    REPEAT: tl.constexpr, HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, PRODUCTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What a program's keys give to the gradient of BLOCK_M rows, and the tokens of the next rows."""
    dk = tl.arange(0, BLOCK_K)
    head, live, q, d_out, of_sum, of_delta = _rows(
        at, end, token, query, d_output, logsumexp, delta, query_t, query_h, d_t, d_h, group, groups * REPEAT, REPEAT,
        HEADS, KEY, VALUE, BLOCK_K, BLOCK_V, BLOCK_M,
    )  # fmt: skip
    _, following, _, _ = rows_of(listed, at + BLOCK_M // HEADS, end, REPEAT, HEADS, BLOCK_M)
    rank = tl.load(ranks + at + tl.arange(0, BLOCK_M) // HEADS, mask=live, other=0)
    d_q = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for i in tl.static_range(PRODUCTS):
        d_q = _added(q, d_out, of_sum, of_delta, token, k[i], v[i], key + i * BLOCK_N, stop, d_q, factor, MASKED)
    place = ((token - from_token) * groups + group).to(tl.int64) * places + rank
    to = ((place * splits + split) * REPEAT + head)[:, None] * KEY + dk[None, :]
    tl.store(waiting + to, d_q.to(waiting.dtype.element_ty), mask=live[:, None] & (dk < KEY)[None, :])
    return following


@triton.jit(do_not_specialize=["part", "from_token", "blocks", "entries", "places"])
def _query_gradient(
    query, keys, values, d_output, logsumexp, delta, starts, stops, list_begin, listed, ranks, item_blocks, firsts,
    ends, waiting, query_t, query_h, keys_t, keys_h, values_t, values_h, d_t, d_h, part, from_token, blocks, entries,
    places, scale, REPEAT: tl.constexpr, HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRODUCTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
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
    own = tl.load(list_begin + group * (blocks + 1) + block) + stop - start
    masked = first + tl.cdiv(tl.maximum(tl.minimum(own, end) - first, 0), step) * step
    _, token, _, _ = rows_of(listed, first, end, REPEAT, HEADS, BLOCK_M)
    for at in range(first, masked, step):
        token = _given(
            at, end, token, k, v, key, stop, query, d_output, logsumexp, delta, listed, ranks, waiting,
            query_t, query_h, d_t, d_h, from_token, split, splits, group, groups, places, factor, True, REPEAT, HEADS,
            KEY, VALUE, BLOCK_K, BLOCK_V, PRODUCTS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    for at in range(masked, end, step):
        token = _given(
            at, end, token, k, v, key, stop, query, d_output, logsumexp, delta, listed, ranks, waiting,
            query_t, query_h, d_t, d_h, from_token, split, splits, group, groups, places, factor, False, REPEAT, HEADS,
            KEY, VALUE, BLOCK_K, BLOCK_V, PRODUCTS, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["from_token", "to_token", "tokens", "places"])
def _sum(
    waiting, chosen, d_query, from_token, to_token, tokens, places, scale, SPLITS: tl.constexpr, REPEAT: tl.constexpr,
    HEADS: tl.constexpr, KEY: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    group, groups, row = tl.program_id(1), tl.num_programs(1), tl.arange(0, BLOCK_M)
    token = from_token + tl.program_id(0) * (BLOCK_M // HEADS) + row // HEADS
    head, dk = row % HEADS, tl.arange(0, BLOCK_K)
    live = (token < to_token) & (head < REPEAT)
    of_list = (group.to(tl.int64) * tokens + token) * places
    of_slots = ((token - from_token) * groups + group).to(tl.int64) * places * SPLITS
    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    place = 0
    while place < places * SPLITS:
        there = tl.load(chosen + of_list + place // SPLITS, mask=live, other=-1) >= 0
        slot = (of_slots + place) * REPEAT + head
        at = waiting + slot[:, None] * KEY + dk[None, :]
        total += tl.load(at, mask=there[:, None] & (dk < KEY)[None, :], other=0).to(tl.float32)
        place = tl.where(tl.max(there.to(tl.int32), 0) > 0, place + 1, places * SPLITS)
    to = token.to(tl.int64) * (groups * REPEAT) + group * REPEAT + head
    tl.store(d_query + to[:, None] * KEY + dk[None, :], (total * scale).to(d_query.dtype.element_ty),
             mask=live[:, None] & (dk < KEY)[None, :])  # fmt: skip


@triton.jit
def _visited(
    at, end, token, k, v, key, stop, query, d_output, logsumexp, delta, listed, query_t, query_h, d_t, d_h, group,
    heads, factor, d_k, d_v, MASKED: tl.constexpr, REPEAT: tl.constexpr, HEADS: tl.constexpr, KEY: tl.constexpr,
    VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dsᵀ q and pᵀ dout of some keys and BLOCK_M rows, added to `d_k` and `d_v`, and the tokens of the next rows.

    Tokens go from step to step, so that what stands at them can be on its way some steps before.
    """
    _, _, q, d_out, of_sum, of_delta = _rows(
        at, end, token, query, d_output, logsumexp, delta, query_t, query_h, d_t, d_h, group, heads, REPEAT, HEADS, KEY,
        VALUE, BLOCK_K, BLOCK_V, BLOCK_M,
    )  # fmt: skip
    _, following, _, _ = rows_of(listed, at + BLOCK_M // HEADS, end, REPEAT, HEADS, BLOCK_M)
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * factor - of_sum[None, :])
    if MASKED:
        p = tl.where((key < stop)[:, None] & (key[:, None] <= token[None, :]), p, 0)
    d_v = tl.dot(p.to(d_out.dtype), d_out, d_v, input_precision="ieee")
    d_p = tl.dot(v, tl.trans(d_out), input_precision="ieee")
    d_k = tl.dot((p * (d_p - of_delta[None, :])).to(q.dtype), q, d_k, input_precision="ieee")
    return d_k, d_v, following


@triton.jit(do_not_specialize=["blocks", "entries"])
def _key_gradient(
    query, keys, values, d_output, logsumexp, delta, starts, stops, list_begin, listed, item_blocks, firsts, ends,
    d_keys, d_values, query_t, query_h, keys_t, keys_h, values_t, values_h, d_t, d_h, blocks, entries, scale,
    REPEAT: tl.constexpr, HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A piece of one block's list, for BLOCK_N of its keys."""
    # Programs of the same piece are adjacent, so that the data of its tokens is read from memory once.
    piece, group = tl.program_id(1), tl.program_id(2)
    pieces, groups = tl.num_programs(1), tl.num_programs(2)
    block, first, end = item_of(item_blocks, firsts, ends, piece, pieces, 0, group, groups)
    if first >= end:
        return
    start, stop = tl.load(starts + block), tl.load(stops + block)
    inner = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    key, dk, dv = start + inner, tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    inside, from_key = key < stop, start + tl.program_id(0) * BLOCK_N
    k = keys_at(keys + group.to(tl.int64) * keys_h, from_key, stop, keys_t, KEY, BLOCK_N, BLOCK_K)
    v = keys_at(values + group.to(tl.int64) * values_h, from_key, stop, values_t, VALUE, BLOCK_N, BLOCK_V)
    d_k, d_v = tl.zeros([BLOCK_N, BLOCK_K], tl.float32), tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    step: tl.constexpr = BLOCK_M // HEADS
    listed += group.to(tl.int64) * entries
    factor, heads = scale * 1.4426950408889634, groups * REPEAT
    # Only the tokens that lie in the block, which come first in its list, are masked.
    own = tl.load(list_begin + group * (blocks + 1) + block) + stop - start
    masked = first + tl.cdiv(tl.maximum(tl.minimum(own, end) - first, 0), step) * step
    _, token, _, _ = rows_of(listed, first, end, REPEAT, HEADS, BLOCK_M)
    for at in range(first, masked, step):
        d_k, d_v, token = _visited(
            at, end, token, k, v, key, stop, query, d_output, logsumexp, delta, listed, query_t, query_h, d_t, d_h,
            group, heads, factor, d_k, d_v, True, REPEAT, HEADS, KEY, VALUE, BLOCK_K, BLOCK_V, BLOCK_M,
        )  # fmt: skip
    for at in range(masked, end, step):
        d_k, d_v, token = _visited(
            at, end, token, k, v, key, stop, query, d_output, logsumexp, delta, listed, query_t, query_h, d_t, d_h,
            group, heads, factor, d_k, d_v, False, REPEAT, HEADS, KEY, VALUE, BLOCK_K, BLOCK_V, BLOCK_M,
        )  # fmt: skip
    to = ((group * pieces + piece).to(tl.int64) * BLOCK + inner)[:, None]
    tl.store(d_keys + to * KEY + dk[None, :], d_k, mask=inside[:, None] & (dk < KEY)[None, :])
    tl.store(d_values + to * VALUE + dv[None, :], d_v, mask=inside[:, None] & (dv < VALUE)[None, :])


@triton.jit(do_not_specialize=["pieces"])
def _add_pieces(
    parts, out, starts, stops, before, counts, pieces, factor, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Some keys of a block: the sum over the pieces of its list."""
    block, group, blocks = tl.program_id(0), tl.program_id(2), tl.num_programs(0)
    groups = tl.num_programs(2)
    inner, d = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_SIZE)
    key = tl.load(starts + block) + inner
    kept = (key < tl.load(stops + block))[:, None] & (d < SIZE)[None, :]
    lane = group.to(tl.int64) * blocks + block
    first, count = tl.load(before + lane), tl.load(counts + lane)
    total = tl.zeros([BLOCK_M, BLOCK_SIZE], tl.float32)
    for piece in range(first, first + count):
        at = ((group * pieces + piece).to(tl.int64) * BLOCK + inner)[:, None] * SIZE + d[None, :]
        total += tl.load(parts + at, mask=kept, other=0)
    to = (key.to(tl.int64) * groups + group)[:, None] * SIZE + d[None, :]
    tl.store(out + to, (total * factor).to(out.dtype.element_ty), mask=kept)
