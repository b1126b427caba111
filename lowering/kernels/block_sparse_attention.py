"""Triton kernels of block-sparse prompt attention: choice of blocks per tile of queries, and attention over them.

`_select` chooses the blocks of each tile from their pooled weights, with one program per tile, KV head and sequence
(`effpass::choose_key_blocks`). `_attend` computes

    out[i] = softmax attention of query i over the visible keys of the blocks in its tile's list

with one program per tile of up to `block_q` queries, query head and sequence (`effpass::block_sparse_attention`). It is
the forward pass of FlashAttention (https://arxiv.org/abs/2307.08691) with one level of indirection: the *whole* blocks,
all of whose keys every query of the tile sees, come first in the list and need no mask; with a softcap, all blocks
take the masked path. The last tiles, which usually have the longest lists, start first. From compute capability 9.0 on,
whole blocks are read by the tensor memory accelerator if sizes and strides permit, which relieves the threads of
computing addresses. Scores, softmax statistics and weighted sums are float32; weights are rounded to the dtype of the
values, and the output to that of the query.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effpass.lowering.kernels.largest import FORCED, MOST, NEVER, choose, in_order
from effpass.lowering.kernels.launch import descriptor, launch_options, overlaps
from effpass.lowering.kernels.running_softmax import update

__all__ = ["MOST_BLOCKS", "Tiling", "block_sparse_attention", "selected", "supported", "tiling"]

MOST_BLOCKS = MOST  # maximum number of blocks that one program chooses among


class Tiling(NamedTuple):
    """Tile sizes and launch configuration of the attention kernel.

    Attributes:
        block_m: queries per program, a divisor of `block_q`.
        block_n: slots that a program reads at once, a divisor of `block_k`.
        num_warps: warps per program.
        num_stages: stages of the software pipeline, which buffer keys and values.
        has_descriptors: whether whole blocks are read by the tensor memory accelerator if possible.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    has_descriptors: bool = True


def tiling(widest: int, block_q: int, block_k: int) -> Tiling:
    """Return the tiling for heads of up to `widest` bytes."""
    if widest > 256:
        return Tiling(block_q, min(block_k, 32), 8 if block_q == 128 else 4, 2)
    if block_q == 64 or block_k == 64:
        return Tiling(block_q, min(block_k, 64), 8 if block_q == 128 else 4, 3)
    return Tiling(block_q, block_k, 8, 3)


def supported(query: Tensor, keys: Tensor, values: Tensor, block_k: int, scale: float) -> bool:
    """Return whether the kernel supports `query` [B, H, T, K]: head sizes from 16 to 256, one dtype, positive scale."""
    return (
        query.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and keys.dtype == values.dtype == query.dtype
        and 16 <= query.shape[-1] <= 256
        and 16 <= values.shape[-1] <= 256
        and keys.stride(-1) == values.stride(-1) == 1
        and query.numel() > 0
        and keys.shape[2] > 0
        and scale > 0
    )


def selected(
    w: Tensor, spans: object, first: int, block_k: int, sink: int, recent: int, density: float, threshold: float,
    places: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Choose blocks from the pooled weights of some tiles.

    Args:
        w: float32 [B, G, tiles, N], pooled weights; -1 for blocks that are not visible.
        spans: :class:`~effpass.lowering.ops.block_sparse_attention.Spans` of all blocks and tiles.
        first: index of the first tile of `w`.

    The other arguments are those of `effpass::choose_key_blocks`.

    Returns:
        Lists int32 [B, G, tiles, places], and counts int32 [B, G, tiles, 2] of whole and of all chosen blocks.
    """
    batch, groups, tiles, blocks = w.shape
    lists = torch.empty((batch, groups, tiles, places), dtype=torch.int32, device=w.device)
    counts = torch.empty((batch, groups, tiles, 2), dtype=torch.int32, device=w.device)
    high, least, earliest = (getattr(spans, name).contiguous() for name in ("high", "least", "earliest"))
    count_all = triton.next_power_of_2(max(16, blocks))
    _select[(tiles, groups, batch)](
        w.contiguous(), high, least, earliest, lists, counts, first, earliest.shape[1], blocks, recent * block_k,
        density, threshold, SINK=sink, THRESHOLD=threshold > 0, PLACES=places, ALL=count_all,
        **launch_options(w.device, 4 if count_all <= 2048 else 8) | _no_overlap(w.device),
    )  # fmt: skip
    return lists, counts


def block_sparse_attention(
    query: Tensor, keys: Tensor, values: Tensor, key_positions: Tensor, query_positions: Tensor, lists: Tensor,
    counts: Tensor, scale: float, softcap: float, block_q: int, block_k: int, how: Tiling | None = None,
) -> Tensor:  # fmt: skip
    """Run `effpass::block_sparse_attention` on tensors that are :func:`supported`; `how` overrides :func:`tiling`."""
    (batch, heads, tokens, key_size), (_, groups, slots, value_size) = query.shape, values.shape
    query = query if query.stride(-1) == 1 else query.contiguous()
    key_positions, query_positions = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (key_positions, query_positions)
    )
    block_d, block_v = (max(16, triton.next_power_of_2(size)) for size in (key_size, value_size))
    how = how or tiling(max(block_d, block_v) * query.element_size(), block_q, block_k)
    of_keys = of_values = None
    if how.has_descriptors and not softcap and block_d == key_size and block_v == value_size:
        of_keys, of_values = descriptor(keys, how.block_n, key_size), descriptor(values, how.block_n, value_size)
    out = query.new_empty((batch, tokens, heads, value_size))
    _attend[(triton.cdiv(tokens, how.block_m), heads, batch)](
        query, keys, values, of_keys, of_values, key_positions, query_positions, lists.contiguous(),
        counts.contiguous(), out, *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        key_positions.stride(0), query_positions.stride(0), tokens, slots, lists.shape[3], scale, softcap, HEADS=heads,
        REPEAT=heads // groups, KEY=key_size, VALUE=value_size, SOFTCAP=softcap != 0,
        DESCRIBED=of_keys is not None and of_values is not None, TILE=block_q, BLOCK_M=how.block_m, BLOCK=block_k,
        BLOCK_N=how.block_n, BLOCK_K=block_d, BLOCK_V=block_v,
        **launch_options(query.device, how.num_warps, how.num_stages) | _no_overlap(query.device),
    )  # fmt: skip
    return out


def _no_overlap(device: torch.device) -> dict[str, bool]:
    return {"launch_pdl": False} if overlaps(device) else {}


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["first", "tiles", "blocks"])
def _select(
    w, high, least, earliest, lists, counts, first, tiles, blocks, near, density, threshold, SINK: tl.constexpr,
    THRESHOLD: tl.constexpr, PLACES: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """One list: whole blocks first, then the others."""
    tile, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = (b * tl.num_programs(1) + group) * tl.num_programs(0) + tile
    n = tl.arange(0, ALL)
    inside = n < blocks
    weight = tl.load(w + row.to(tl.int64) * blocks + n, mask=inside, other=-1)
    seen = weight >= 0
    of_high = tl.load(high + b * blocks + n, mask=inside, other=-1)
    of_least = tl.load(least + b * blocks + n, mask=inside, other=-1)
    from_here = tl.load(earliest + b * tiles + first + tile)
    # Written so that nothing overflows: for a tile of padding, `from_here` is the largest int32.
    forced = (of_high >= from_here - near) | (tl.cumsum(seen.to(tl.int32), 0) <= SINK)
    key = tl.where(seen, tl.where(forced, FORCED, in_order(weight)), NEVER)
    there = tl.sum(seen.to(tl.int32), 0)
    if THRESHOLD:
        wanted = tl.sum(tl.where(seen, weight, 0.0), 0) * threshold
        low = tl.min(tl.where(seen, key, 2147483647), 0)
        end = tl.max(key, 0) + 1
        # Invariant: blocks with keys ≥ `low` hold the wanted weight, blocks with keys ≥ `end` do not.
        while low + 1 < end:
            middle = (low >> 1) + (end >> 1) + (low & end & 1)
            enough = tl.sum(tl.where(key >= middle, weight, 0.0), 0) >= wanted
            low = tl.where(enough, middle, low)
            end = tl.where(enough, end, middle)
        count = tl.sum(((key >= low) & seen).to(tl.int32), 0)
    else:
        count = tl.ceil(there.to(tl.float32) * density).to(tl.int32)
    count = tl.maximum(count, tl.sum((forced & seen).to(tl.int32), 0))
    chosen, _, count = choose(key, tl.minimum(count, PLACES))
    whole = chosen & (of_least >= 0) & (of_high <= from_here)
    torn = chosen & (whole == 0)
    wholes = tl.sum(whole.to(tl.int32), 0)
    out = lists + row.to(tl.int64) * PLACES
    tl.store(out + tl.cumsum(whole.to(tl.int32), 0) - 1, n, mask=whole)
    tl.store(out + wholes + tl.cumsum(torn.to(tl.int32), 0) - 1, n, mask=torn)
    tl.store(counts + row * 2, wholes)
    tl.store(counts + row * 2 + 1, count)


@triton.jit
def _whole(
    q, end, places, keys, values, of_keys, of_values, first_key, first_value, best, total, out, keys_s, values_s, scale,
    DESCRIBED: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Blocks in the first `end` places into the running softmax; every query sees all of them."""
    parts: tl.constexpr = BLOCK // BLOCK_N
    dk, dv, span = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    factor = scale * 1.4426950408889634
    for i in range(0, end * parts):
        slot = tl.load(places + i // parts) * BLOCK + i % parts * BLOCK_N
        if DESCRIBED:
            k = tl.trans(of_keys.load([first_key + slot, 0]))
            v = of_values.load([first_value + slot, 0])
        else:
            rows = (slot + span).to(tl.int64)
            at_k = keys + rows[None, :] * keys_s + dk[:, None]
            at_v = values + rows[:, None] * values_s + dv[None, :]
            k = tl.load(at_k) if KEY == BLOCK_K else tl.load(at_k, mask=(dk < KEY)[:, None], other=0)
            v = tl.load(at_v) if VALUE == BLOCK_V else tl.load(at_v, mask=(dv < VALUE)[None, :], other=0)
        score = tl.dot(q, k, input_precision="ieee")
        # As scale > 0, it can be applied after the maximum, and `score * factor - higher` is one fused multiply-add.
        higher = tl.maximum(best, tl.max(score, 1) * factor)
        weight = tl.exp2(score * factor - higher[:, None])
        fade = tl.exp2(best - higher)
        total = total * fade + tl.sum(weight, 1)
        out = tl.dot(weight.to(v.dtype), v, out * fade[:, None], input_precision="ieee")
        best = higher
    return best, total, out


@triton.jit
def _masked(
    q, begin, end, places, keys, values, key_positions, of_queries, best, total, out, keys_s, values_s, slots, scale,
    softcap, SOFTCAP: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Blocks in the places from `begin` to `end`, as far as each query sees them."""
    parts: tl.constexpr = BLOCK // BLOCK_N
    dk, dv, span = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    for i in range(begin * parts, end * parts):
        slot = tl.load(places + i // parts) * BLOCK + i % parts * BLOCK_N + span
        at_k = keys + slot.to(tl.int64)[None, :] * keys_s + dk[:, None]
        at_v = values + slot.to(tl.int64)[:, None] * values_s + dv[None, :]
        k = tl.load(at_k, mask=(slot < slots)[None, :] & (dk < KEY)[:, None], other=0)
        v = tl.load(at_v, mask=(slot < slots)[:, None] & (dv < VALUE)[None, :], other=0)
        of_keys = tl.load(key_positions + slot, mask=slot < slots, other=-1)
        best, total, out = update(
            q, k, v, of_keys, of_queries, best, total, out, scale, softcap, 0, True, SOFTCAP, False
        )  # fmt: skip
    return best, total, out


@triton.jit(do_not_specialize=["tokens", "slots", "most"])
def _attend(
    query, keys, values, of_keys, of_values, key_positions, query_positions, lists, counts, out, query_b, query_h,
    query_t, keys_b, keys_h, keys_s, values_b, values_h, values_s, key_positions_b, query_positions_b, tokens, slots,
    most, scale, softcap, HEADS: tl.constexpr, REPEAT: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    SOFTCAP: tl.constexpr, DESCRIBED: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    part, head, b = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // REPEAT
    token, dk, dv = part * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    live = token < tokens
    query += b * query_b + head * query_h
    first_key = ((b * keys_b + group * keys_h) // keys_s).to(tl.int32)
    first_value = ((b * values_b + group * values_h) // values_s).to(tl.int32)
    keys += b * keys_b + group * keys_h
    values += b * values_b + group * values_h
    key_positions += b * key_positions_b
    row = (b * (HEADS // REPEAT) + group) * tl.cdiv(tokens, TILE) + part // (TILE // BLOCK_M)
    lists += row * most
    wholes, end = tl.load(counts + row * 2), tl.load(counts + row * 2 + 1)
    of_queries = tl.load(query_positions + b * query_positions_b + token, mask=live, other=-1)
    inside = live[:, None] & (dk < KEY)[None, :]
    q = tl.load(query + token.to(tl.int64)[:, None] * query_t + dk[None, :], mask=inside, other=0)
    best = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sum_v = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    masked = wholes
    if SOFTCAP:
        masked = 0
    else:
        best, total, sum_v = _whole(
            q, wholes, lists, keys, values, of_keys, of_values, first_key, first_value, best, total, sum_v, keys_s,
            values_s, scale, DESCRIBED, KEY, VALUE, BLOCK, BLOCK_N, BLOCK_K, BLOCK_V,
        )  # fmt: skip
    best, total, sum_v = _masked(
        q, masked, end, lists, keys, values, key_positions, of_queries, best, total, sum_v, keys_s, values_s, slots,
        scale, softcap, SOFTCAP, KEY, VALUE, BLOCK, BLOCK_N, BLOCK_K, BLOCK_V,
    )  # fmt: skip
    # Padding must see nothing, but whole blocks are not masked. A query that saw nothing has a total of 0.
    total = tl.where(of_queries >= 0, total, 0)
    value = tl.where((total > 0)[:, None], sum_v / tl.where(total > 0, total, 1)[:, None], 0)
    to = ((b * tokens + token) * HEADS + head)[:, None] * VALUE + dv[None, :]
    tl.store(out + to, value.to(out.dtype.element_ty), mask=live[:, None] & (dv < VALUE)[None, :])
