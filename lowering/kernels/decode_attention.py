"""Attention of few tokens over a long cache: Triton kernels of `cached_attention` and `rope_cached_attention`.

The equation is that of :mod:`effpass.lowering.ops.cached_attention`, computed by flash-decoding
(https://crfm.stanford.edu/2023/10/12/flashdecoding.html). The slots of each KV head are cut into tiles, which several
programs process in turn with an online softmax. The last program to finish merges the partial results in their order,
so that the output does not depend on which one was last. The rows of a tile are the tokens times the query heads that
share the KV head, so that keys are read once for all of them. Scores, statistics and partial sums are float32; weights
are rounded to the dtype of the values, and the output to that of the query.

In `rope_cached_attention` the new tokens form one more tile. The program that owns it applies norms and rotation, in
float32, writes keys and values to the cache and attends to them. No program reads a slot that this launch writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.launch import counters, launch_options, multiprocessors, overlaps
from effpass.lowering.kernels.running_softmax import update

__all__ = ["MOST_ROWS", "cached_attention", "rope_cached_attention", "supported"]

MOST_ROWS = 64  # maximum number of tokens times query heads per KV head


def supported(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Return whether the kernel supports `query` [B, H, T, K]: T · H / G up to 64, head sizes 16 to 256, one dtype."""
    (_, heads, tokens, key_size), groups = query.shape, keys.shape[1]
    return (
        0 < tokens * (heads // groups) <= MOST_ROWS
        and query.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and keys.dtype == values.dtype == query.dtype
        and 16 <= key_size <= 256
        and 16 <= values.shape[-1] <= 256
        and keys.stride(-1) == values.stride(-1) == 1
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
    query = _last_contiguous(query).transpose(1, 2)
    return _launch(
        query, None, None, None, None, None, None, 0.0, 0.0, keys, values, key_positions, query_positions, filled,
        scale, window, softcap,
    )  # fmt: skip


def rope_cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    keys: Tensor,
    values: Tensor,
    key_positions: Tensor,
    query_positions: Tensor,
    start: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Run `effpass::rope_cached_attention` on tensors that are :func:`supported`."""
    return _launch(
        _last_contiguous(query), _last_contiguous(key), _last_contiguous(value), cos.contiguous(), sin.contiguous(),
        query_norm, key_norm, norm_eps, norm_offset, keys, values, key_positions, query_positions, start, scale, window,
        softcap,
    )  # fmt: skip


def _last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _launch(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    keys: Tensor,
    values: Tensor,
    key_positions: Tensor,
    query_positions: Tensor,
    start: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    (batch, tokens, heads, key_size), (_, groups, slots, value_size) = query.shape, values.shape
    device = query.device
    key_positions, query_positions = _last_contiguous(key_positions), _last_contiguous(query_positions)
    rows = tokens * (heads // groups)
    shape = tile_shape(rows, tokens, key_size, value_size, query.element_size(), batch * groups, device)
    num_warps, tiles = shape.pop("num_warps"), triton.cdiv(slots, shape["BLOCK_N"]) + (key is not None)
    splits = split_count(batch * groups, tiles, num_warps, device)
    out = query.new_empty((batch, tokens, heads, value_size))
    parts = sums = done = None
    if splits > 1:
        parts = query.new_empty((batch * groups, splits, rows, value_size), dtype=torch.float32)
        sums = query.new_empty((batch * groups, splits, 2, rows), dtype=torch.float32)
        done = counters(device, batch * groups)
    none = (0, 0, 0)
    strides = (
        *query.stride()[:3],
        *(none if key is None else key.stride()[:3]),
        *(none if value is None else value.stride()[:3]),
        *keys.stride()[:3],
        *values.stride()[:3],
        0 if cos is None or cos.shape[0] == 1 else cos.stride(0),
        key_positions.stride(0),
        query_positions.stride(0),
    )
    options = launch_options(device, num_warps)
    _attend[(splits, batch * groups)](
        query, key, value, cos, sin, query_norm, key_norm, keys, values, key_positions, query_positions, start, out,
        parts, sums, done, *strides, tokens, slots, norm_eps, norm_offset, scale, softcap, window, GROUPS=groups,
        REPEAT=heads // groups, KEY=key_size, VALUE=value_size, ROTATED=0 if cos is None else cos.shape[-1],
        SPLITS=splits, SOFTCAP=softcap != 0, WINDOW=window != 0, PDL=overlaps(device), **shape, **options,
    )  # fmt: skip
    return out


def tile_shape(
    rows: int, tokens: int, key_size: int, value_size: int, element_size: int, heads: int, device: torch.device
) -> dict[str, int]:
    """Return the tile sizes. The keys and values of two tiles are held in registers, which bounds their slots."""
    block_k, block_v = (max(16, triton.next_power_of_2(size)) for size in (key_size, value_size))
    widest = max(block_k, block_v) * element_size
    live = triton.next_power_of_2(rows)
    block_n, num_warps = 64 if widest <= 256 else 32 if widest <= 512 else 16, 4 if rows <= 16 else 8
    if widest <= 128 and rows <= 16 and 2 * heads > multiprocessors(device):
        block_n, num_warps = 256, 8  # many small heads fill the device without splits, so nothing is merged
    return {
        "BLOCK_R": max(16, live),
        "LIVE": live,
        "BLOCK_T": max(16, triton.next_power_of_2(tokens)),
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "BLOCK_V": block_v,
        "BLOCK_S": max(1, min(32, 8192 // (live * block_v))),
        "num_warps": num_warps,
    }


def split_count(heads: int, tiles: int, num_warps: int, device: torch.device) -> int:
    """Return the programs per KV head so that all run at once: two per multiprocessor with 4 warps, one with 8."""
    return max(1, min(multiprocessors(device) * 8 // num_warps // heads, tiles))


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _rotated(
    x, rows, inside, scale, scale_against, cos, sin, of_angles, eps, offset, NORM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Rows of heads after their norm and rotary embedding, in float32.

    The feature that each one is rotated against is loaded once more: registers can't be shuffled.
    """
    d, other = tl.arange(0, BLOCK), _partner(BLOCK, ROTATED)
    here = inside[:, None] & (d < WIDTH)[None, :]
    value = tl.load(x + rows[:, None] + d[None, :], mask=here, other=0).to(tl.float32)
    against = tl.load(x + rows[:, None] + other[None, :], mask=here, other=0).to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(value * value, 1) / WIDTH + eps)[:, None]
        value *= factor * (offset + scale.to(tl.float32))[None, :]
        against *= factor * (offset + scale_against.to(tl.float32))[None, :]
    turning = inside[:, None] & (d < ROTATED)[None, :]
    c = tl.load(cos + of_angles[:, None] + d[None, :], mask=turning, other=1).to(tl.float32)
    s = tl.load(sin + of_angles[:, None] + d[None, :], mask=turning, other=0).to(tl.float32)
    return value * c + tl.where(d < ROTATED // 2, -against, against) * s


@triton.jit
def _partner(BLOCK: tl.constexpr, ROTATED: tl.constexpr):
    """The feature that each one is rotated against."""
    d = tl.arange(0, BLOCK)
    return tl.where(d < ROTATED // 2, d + ROTATED // 2, tl.where(d < ROTATED, d - ROTATED // 2, d))


@triton.jit
def _scales(norm, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROTATED: tl.constexpr):
    """The norm's weights, and those of the features that each one is rotated against."""
    d = tl.arange(0, BLOCK)
    if norm is None:
        return d, d
    else:
        return (
            tl.load(norm + d, mask=d < WIDTH, other=0),
            tl.load(norm + _partner(BLOCK, ROTATED), mask=d < WIDTH, other=0),
        )


@triton.jit(do_not_specialize=["tokens", "window"])
def _attend(
    query, key, value, cos, sin, query_norm, key_norm, keys, values, key_positions, query_positions, start, out, parts,
    sums, done,
    query_b, query_t, query_h, key_b, key_t, key_h, value_b, value_t, value_h, keys_b, keys_h, keys_s, values_b,
    values_h, values_s, angles_b, key_positions_b, query_positions_b,
    tokens, slots, eps, offset, scale, softcap, window,
    GROUPS: tl.constexpr, REPEAT: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, ROTATED: tl.constexpr,
    SPLITS: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr, BLOCK_R: tl.constexpr,
    LIVE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    split, head = tl.program_id(0), tl.program_id(1)
    b, group = (head // GROUPS).to(tl.int64), head % GROUPS
    rows, dk, dv, span = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    token, live = rows // REPEAT, rows < tokens * REPEAT
    keys += b * keys_b + group * keys_h
    values += b * values_b + group * values_h
    key_positions += b * key_positions_b
    if PDL and key is None:
        gdc_wait()
    end = tl.minimum(tl.load(start), slots)
    tiles = tl.cdiv(end, BLOCK_N)
    all_tiles = tiles
    if key is not None:
        all_tiles += 1
    active = tl.maximum(tl.minimum(all_tiles, SPLITS), 1)
    of_queries = tl.load(query_positions + b * query_positions_b + token, mask=live, other=-1)
    earliest = tl.min(tl.where(of_queries >= 0, of_queries, 2147483647), 0) - window
    slot = split * BLOCK_N + span
    of_keys = tl.load(key_positions + slot, mask=slot < end, other=-1)
    follower = slot + active * BLOCK_N
    of_next = tl.load(key_positions + follower, mask=follower < end, other=-1)
    reach = (slot < end) & (split < active)
    if WINDOW:
        reach = reach & (of_keys > earliest)
    k = tl.load(keys + slot[:, None] * keys_s + dk[None, :], mask=reach[:, None] & (dk < KEY)[None, :], other=0)
    v = tl.load(values + slot[:, None] * values_s + dv[None, :], mask=reach[:, None] & (dv < VALUE)[None, :], other=0)
    query_scales = _scales(query_norm, KEY, BLOCK_K, ROTATED)
    key_scales = _scales(key_norm, KEY, BLOCK_K, ROTATED)
    if PDL:
        if key is not None:
            gdc_wait()
        gdc_launch_dependents()
    if split < active:
        of_rows = b * query_b + token * query_t + (group * REPEAT + rows % REPEAT) * query_h
        if key is not None:
            owner = tiles % active == split
            t = tl.arange(0, BLOCK_T)
            new = (t < tokens) & owner
            of_value = b * value_b + t * value_t + group * value_h
            new_v = tl.load(value + of_value[:, None] + dv[None, :], mask=new[:, None] & (dv < VALUE)[None, :], other=0)
            new_k = _rotated(
                key, b * key_b + t * key_t + group * key_h, new, key_scales[0], key_scales[1], cos, sin,
                b * angles_b + t * ROTATED, eps, offset, key_norm is not None, KEY, BLOCK_K, ROTATED,
            ).to(keys.dtype.element_ty)  # fmt: skip
            place = (end + t).to(tl.int64)
            new = new & (place < slots)
            of_new = tl.load(key_positions + place, mask=new, other=-1)
            of_angles = b * angles_b + token * ROTATED
            q = _rotated(
                query, of_rows, live, query_scales[0], query_scales[1], cos, sin, of_angles, eps, offset,
                query_norm is not None, KEY, BLOCK_K, ROTATED,
            ).to(keys.dtype.element_ty)  # fmt: skip
        else:
            inside = live[:, None] & (dk < KEY)[None, :]
            q = tl.load(query + of_rows[:, None] + dk[None, :], mask=inside, other=0)
        best = tl.full([BLOCK_R], -1e30, tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        sum_v = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
        for tile in range(split, tiles, active):
            # Load the next tile, and the positions of the one after it, while this one is processed.
            slot = (tile + active) * BLOCK_N + span
            reach = slot < end
            if WINDOW:
                reach = reach & (of_next > earliest)
            next_k = tl.load(
                keys + slot.to(tl.int64)[:, None] * keys_s + dk[None, :],
                mask=reach[:, None] & (dk < KEY)[None, :],
                other=0,
            )
            next_v = tl.load(
                values + slot.to(tl.int64)[:, None] * values_s + dv[None, :],
                mask=reach[:, None] & (dv < VALUE)[None, :],
                other=0,
            )
            after = slot + active * BLOCK_N
            of_after = tl.load(key_positions + after, mask=after < end, other=-1)
            best, total, sum_v = update(
                q, tl.trans(k), v, of_keys, of_queries, best, total, sum_v, scale, softcap, window, True, SOFTCAP,
                WINDOW,
            )  # fmt: skip
            k, v, of_keys, of_next = next_k, next_v, of_next, of_after
        if key is not None:  # noqa: SIM102  (resolved when the kernel is compiled)
            if owner:
                tl.store(keys + place[:, None] * keys_s + dk[None, :], new_k, mask=new[:, None] & (dk < KEY)[None, :])
                tl.store(
                    values + place[:, None] * values_s + dv[None, :], new_v, mask=new[:, None] & (dv < VALUE)[None, :]
                )
                best, total, sum_v = update(
                    q, tl.trans(new_k), new_v, of_new, of_queries, best, total, sum_v, scale, softcap, window, True,
                    SOFTCAP, WINDOW,
                )  # fmt: skip
        heads: tl.constexpr = GROUPS * REPEAT
        if SPLITS == 1:
            _store(out, sum_v, total, b, group, rows, live, tokens, dv, heads, REPEAT, VALUE)
        else:
            if active == 1:
                _store(out, sum_v, total, b, group, rows, live, tokens, dv, heads, REPEAT, VALUE)
            else:
                _merge(
                    out, sum_v, total, best, parts, sums, done, split, head, active, b, group, rows, live, tokens, dv,
                    heads, REPEAT, VALUE, SPLITS, LIVE, BLOCK_V, BLOCK_S,
                )  # fmt: skip


@triton.jit
def _store(out, sum_v, total, b, group, rows, live, tokens, dv, HEADS: tl.constexpr, REPEAT: tl.constexpr,
           VALUE: tl.constexpr):  # fmt: skip
    """A row that saw no slot has a total of 0 and gives 0."""
    value = sum_v / tl.where(total > 0, total, 1)[:, None]
    head = ((b * tokens + rows // REPEAT) * HEADS + group * REPEAT + rows % REPEAT) * VALUE
    inside = live[:, None] & (dv < VALUE)[None, :]
    tl.store(out + head[:, None] + dv[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _merge(
    out, sum_v, total, best, parts, sums, done, split, head, active, b, group, rows, live, tokens, dv,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, VALUE: tl.constexpr, SPLITS: tl.constexpr, LIVE: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Leave this program's softmax for the last one of the head, which merges all and stores."""
    count = tokens * REPEAT
    parts += head.to(tl.int64) * SPLITS * count * VALUE
    sums += head * SPLITS * 2 * count
    inside = live[:, None] & (dv < VALUE)[None, :]
    tl.store(parts + (split * count + rows[:, None]) * VALUE + dv[None, :], sum_v, mask=inside)
    tl.store(sums + split * 2 * count + rows, best, mask=live)
    tl.store(sums + (split * 2 + 1) * count + rows, total, mask=live)
    tl.debug_barrier()  # the counter must be incremented after the stores of all threads
    if tl.atomic_add(done + head, 1, sem="acq_rel") == active - 1:
        tl.store(done + head, 0)
        r, s = tl.arange(0, LIVE), tl.arange(0, BLOCK_S)
        highest = tl.full([LIVE], -1e30, tl.float32)
        whole = tl.zeros([LIVE], tl.float32)
        merged = tl.zeros([LIVE, BLOCK_V], tl.float32)
        for first in range(0, active, BLOCK_S):
            there = ((first + s) < active)[:, None] & (r < count)[None, :]
            of_sums = (first + s)[:, None] * 2 * count + r[None, :]
            bests = tl.load(sums + of_sums, mask=there, other=-1e30, cache_modifier=".cg")
            totals = tl.load(sums + of_sums + count, mask=there, other=0, cache_modifier=".cg")
            values = tl.load(
                parts + ((first + s)[:, None, None] * count + r[None, :, None]) * VALUE + dv[None, None, :],
                mask=there[:, :, None] & (dv < VALUE)[None, None, :],
                other=0,
                cache_modifier=".cg",
            )
            higher = tl.maximum(highest, tl.max(bests, 0))
            share = tl.exp2(bests - higher[None, :])
            fade = tl.exp2(highest - higher)
            whole = whole * fade + tl.sum(share * totals, 0)
            merged = merged * fade[:, None] + tl.sum(share[:, :, None] * values, 0)
            highest = higher
        _store(out, merged, whole, b, group, r, r < count, tokens, dv, HEADS, REPEAT, VALUE)
