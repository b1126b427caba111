"""Attention of many tokens over a cache whose slots record positions: a Triton kernel of `effpass::cached_attention`.

It is the forward pass of FlashAttention (https://arxiv.org/abs/2307.08691), with one program per tile of tokens, query
head and sequence. A small launch first finds the range of positions in each block of slots. From these a program
derives the range of blocks that its queries can see and, within it, the run of blocks that all its queries see
completely, from the first such block on; only blocks outside of the run are masked. The order of tokens in the cache
therefore affects speed, but not results. Scores, statistics and sums are float32; weights are rounded to the dtype of
the values, and the output to that of the query.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effpass.lowering.kernels.running_softmax import update

__all__ = ["cached_attention", "supported"]

_FAR = tl.constexpr(2147483647)


def supported(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Return whether the kernel supports `query` [B, H, T, K]: head sizes from 16 to 256, one dtype."""
    return (
        query.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and keys.dtype == values.dtype == query.dtype
        and 16 <= query.shape[-1] <= 256
        and 16 <= values.shape[-1] <= 256
        and keys.stride(-1) == values.stride(-1) == 1
        and query.numel() > 0
        and keys.shape[2] > 0
    )


def cached_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_positions: Tensor,
    query_positions: Tensor,
    filled: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Run `effpass::cached_attention` on tensors that are :func:`supported`."""
    (batch, heads, tokens, key_size), (_, groups, slots, value_size) = query.shape, values.shape
    query = query if query.stride(-1) == 1 else query.contiguous()
    key_positions, query_positions = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (key_positions, query_positions)
    )
    shape = tile_shape(key_size, value_size, query.element_size())
    options = {"num_warps": shape.pop("num_warps"), "num_stages": shape.pop("num_stages")}
    blocks = triton.cdiv(slots, shape["BLOCK_N"])
    spans = torch.empty((batch, 3, blocks), dtype=torch.int32, device=query.device)
    _spans[(triton.cdiv(blocks, 16), batch)](
        key_positions, filled, spans, key_positions.stride(0), slots, blocks, BLOCK_N=shape["BLOCK_N"], BLOCKS=16
    )
    out = query.new_empty((batch, tokens, heads, value_size))
    _attend[(triton.cdiv(tokens, shape["BLOCK_M"]), heads, batch)](
        query, keys, values, key_positions, query_positions, spans, out, *query.stride()[:3], *keys.stride()[:3],
        *values.stride()[:3], key_positions.stride(0), query_positions.stride(0), tokens, slots, blocks, scale, softcap,
        window, HEADS=heads, REPEAT=heads // groups, KEY=key_size, VALUE=value_size, SOFTCAP=softcap != 0,
        WINDOW=window != 0, **shape, **options,
    )  # fmt: skip
    return out


def tile_shape(key_size: int, value_size: int, element_size: int) -> dict[str, int]:
    """Return the tile sizes, the warps per program and the stages of the pipeline of keys and values."""
    block_k, block_v = (max(16, triton.next_power_of_2(size)) for size in (key_size, value_size))
    widest = max(block_k, block_v) * element_size
    return {
        "BLOCK_M": 128 if widest <= 256 and element_size == 2 else 64,
        "BLOCK_N": 64 if widest <= 256 else 32,
        "BLOCK_K": block_k,
        "BLOCK_V": block_v,
        "num_warps": 8,
        "num_stages": 3 if widest <= 256 else 2,
    }


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["slots", "blocks"])
def _spans(positions, filled, spans, positions_b, slots, blocks, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr):
    """Of each block of slots: its first and last position, and its least number, -1 where a slot is empty."""
    b = tl.program_id(1)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    slot = block[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    end = tl.minimum(tl.load(filled), slots)
    position = tl.load(positions + b.to(tl.int64) * positions_b + slot, mask=slot < end, other=-1)
    spans += b * 3 * blocks + block
    tl.store(spans, tl.min(tl.where(position >= 0, position, _FAR), 1), mask=block < blocks)
    tl.store(spans + blocks, tl.max(position, 1), mask=block < blocks)
    tl.store(spans + 2 * blocks, tl.min(position, 1), mask=block < blocks)


@triton.jit
def _tiles(
    q, begin, end, keys, values, key_positions, of_queries, best, total, out, keys_s, values_s, slots, scale, softcap,
    window, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Blocks of slots from `begin` to `end` into the running softmax, whose scores are in powers of two."""
    dk, dv, span = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    for block in range(begin, end):
        slot = block * BLOCK_N + span
        of_k = keys + slot.to(tl.int64)[None, :] * keys_s + dk[:, None]
        of_v = values + slot.to(tl.int64)[:, None] * values_s + dv[None, :]
        if MASKED:
            k = tl.load(of_k, mask=(slot < slots)[None, :] & (dk < KEY)[:, None], other=0)
            v = tl.load(of_v, mask=(slot < slots)[:, None] & (dv < VALUE)[None, :], other=0)
        else:
            k = tl.load(of_k) if KEY == BLOCK_K else tl.load(of_k, mask=(dk < KEY)[:, None], other=0)
            v = tl.load(of_v) if VALUE == BLOCK_V else tl.load(of_v, mask=(dv < VALUE)[None, :], other=0)
        of_keys = tl.load(key_positions + slot, mask=slot < slots, other=-1) if MASKED else slot
        best, total, out = update(
            q, k, v, of_keys, of_queries, best, total, out, scale, softcap, window, MASKED, SOFTCAP, WINDOW
        )  # fmt: skip
    return best, total, out


@triton.jit(do_not_specialize=["tokens", "slots", "blocks", "window"])
def _attend(
    query, keys, values, key_positions, query_positions, spans, out, query_b, query_h, query_t, keys_b, keys_h, keys_s,
    values_b, values_h, values_s, key_positions_b, query_positions_b, tokens, slots, blocks, scale, softcap, window,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # The last tokens see the most slots, so their programs start first.
    tile, head, b = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // REPEAT
    token, dk, dv = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    live = token < tokens
    query += b * query_b + head * query_h
    keys += b * keys_b + group * keys_h
    values += b * values_b + group * values_h
    key_positions += b * key_positions_b
    spans += b * 3 * blocks
    of_queries = tl.load(query_positions + b * query_positions_b + token, mask=live, other=-1)
    earliest, latest = tl.min(tl.where(of_queries >= 0, of_queries, _FAR), 0), tl.max(of_queries, 0)

    # Queries may see blocks `begin` to `end`; every query sees all slots of blocks `whole` to `torn`.
    begin, end, whole = blocks, 0, blocks
    for first in range(0, blocks, 512):
        block = first + tl.arange(0, 512)
        low = tl.load(spans + block, mask=block < blocks, other=_FAR)
        high = tl.load(spans + blocks + block, mask=block < blocks, other=-1)
        least = tl.load(spans + 2 * blocks + block, mask=block < blocks, other=-1)
        seen = (high >= 0) & (low <= latest)
        sees_whole = (least >= 0) & (high <= earliest)
        if WINDOW:
            seen = seen & (earliest - high < window)
            sees_whole = sees_whole & (latest - low < window)
        begin = tl.minimum(begin, tl.min(tl.where(seen, block, _FAR), 0))
        end = tl.maximum(end, tl.max(tl.where(seen, block + 1, 0), 0))
        whole = tl.minimum(whole, tl.min(tl.where(sees_whole & seen, block, _FAR), 0))
    whole = tl.minimum(whole, end)
    torn = end
    for first in range(0, blocks, 512):
        block = first + tl.arange(0, 512)
        low = tl.load(spans + block, mask=block < blocks, other=_FAR)
        high = tl.load(spans + blocks + block, mask=block < blocks, other=-1)
        least = tl.load(spans + 2 * blocks + block, mask=block < blocks, other=-1)
        partly = (least < 0) | (high > earliest)
        if WINDOW:
            partly = partly | (latest - low >= window)
        torn = tl.minimum(torn, tl.min(tl.where(partly & (block >= whole), block, _FAR), 0))

    inside = live[:, None] & (dk < KEY)[None, :]
    q = tl.load(query + token.to(tl.int64)[:, None] * query_t + dk[None, :], mask=inside, other=0)
    best = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sum_v = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    best, total, sum_v = _tiles(
        q, begin, whole, keys, values, key_positions, of_queries, best, total, sum_v, keys_s, values_s, slots, scale,
        softcap, window, True, SOFTCAP, WINDOW, KEY, VALUE, BLOCK_N, BLOCK_K, BLOCK_V,
    )  # fmt: skip
    best, total, sum_v = _tiles(
        q, whole, torn, keys, values, key_positions, of_queries, best, total, sum_v, keys_s, values_s, slots, scale,
        softcap, window, False, SOFTCAP, WINDOW, KEY, VALUE, BLOCK_N, BLOCK_K, BLOCK_V,
    )  # fmt: skip
    best, total, sum_v = _tiles(
        q, torn, end, keys, values, key_positions, of_queries, best, total, sum_v, keys_s, values_s, slots, scale,
        softcap, window, True, SOFTCAP, WINDOW, KEY, VALUE, BLOCK_N, BLOCK_K, BLOCK_V,
    )  # fmt: skip
    # Padding must see nothing, but some blocks are not masked. A query that saw nothing has a total of 0.
    total = tl.where(of_queries >= 0, total, 0)
    value = tl.where((total > 0)[:, None], sum_v / tl.where(total > 0, total, 1)[:, None], 0)
    places = ((b * tokens + token) * HEADS + head)[:, None] * VALUE + dv[None, :]
    tl.store(out + places, value.to(out.dtype.element_ty), mask=live[:, None] & (dv < VALUE)[None, :])
