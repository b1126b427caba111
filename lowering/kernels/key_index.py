"""Triton kernels of `effpass::index_keys`: statistics of blocks of keys, and labels of tokens in 4 bits per channel.

The equations are those of :mod:`effpass.lowering.ops.two_level_attention_index`. `_index` runs one program per block
that may hold a new key, KV head and sequence; it recomputes the whole block, in float32, and rounds statistics to the
dtype of the index. `index_token`, which enters the key of a decode step, is part of the first launch of
:mod:`effpass.lowering.kernels.two_level_attention`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.launch import launch_options, overlaps

__all__ = ["STATISTICS", "index_keys", "index_token", "indexable", "label_shape", "strides"]

STATISTICS = {"min_max": 0, "mean": 1, "mean_std": 2}


def indexable(keys: Tensor, channels: Tensor, labels: Tensor) -> bool:
    """Return whether the kernels can index `keys`: a supported dtype, and labels of at least 32 channels or none."""
    return (
        keys.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and keys.stride(-1) == 1
        and (channels.shape[1] >= 32 or not labels.shape[2])
    )


def index_keys(
    keys: Tensor, block_table: Tensor | None, key_positions: Tensor, start: Tensor, filled: Tensor, tokens: int,
    channels: Tensor, statistics: Tensor, seen: Tensor, labels: Tensor, ranges: Tensor, block: int, statistic: str,
) -> None:  # fmt: skip
    """Run `effpass::index_keys` on keys that are :func:`indexable`."""
    (batch, slots), (groups, of_label) = key_positions.shape, channels.shape
    blocks, touched = triton.cdiv(slots, block), tokens // block + 2
    _index[(min(touched, blocks), batch * groups)](
        keys, block_table, key_positions, start, filled, channels, statistics, seen, labels, ranges,
        *strides(keys, block_table), key_positions.stride(0), slots, blocks, GROUPS=groups, KEY=keys.shape[-1],
        CHANNELS=of_label, BLOCK=block, STATISTIC=STATISTICS[statistic], HAS_BLOCKS=seen.shape[2] > 0,
        HAS_LABELS=labels.shape[2] > 0, **label_shape(of_label, keys.shape[-1]),
        **launch_options(keys.device, 4) | _no_overlap(keys.device),
    )  # fmt: skip


def strides(keys: Tensor, block_table: Tensor | None) -> tuple[int, int, int]:
    """Return the strides of sequence, KV head and slot; with pages, those of page and slot, and 0 for the head."""
    return keys.stride()[:3] if block_table is None else (keys.stride(0), 0, keys.stride(1))  # type: ignore[return-value]


def label_shape(of_label: int, key_size: int) -> dict[str, int]:
    half = max(16, triton.next_power_of_2(of_label // 2))
    return {"HALF": half, "BLOCK_K": min(128, max(16, triton.next_power_of_2(key_size)))}


def _no_overlap(device: torch.device) -> dict[str, bool]:
    return {"launch_pdl": False} if overlaps(device) else {}


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _rows(
    slot, b, group, head, keys, block_table, keys_b, keys_h, keys_s, blocks, host, BLOCK: tl.constexpr,
    HOST: tl.constexpr,
):  # fmt: skip
    """Where the keys of `slot` [N] stand, of one block; HOST is the width of host's rows."""
    if block_table is None:
        return keys + (b * keys_b + group * keys_h) + slot.to(tl.int64) * keys_s
    else:
        page = tl.load(block_table + head * blocks + slot // BLOCK).to(tl.int64)
        rows = keys + (page * keys_b + slot % BLOCK * keys_s)
        if host is not None:
            rows = tl.where(page >= 0, rows, host + (head.to(tl.int64) * blocks * BLOCK + slot) * HOST)
        return rows


@triton.jit
def _statistics(k, there, count, out, c, KEY: tl.constexpr, STATISTIC: tl.constexpr):
    """Of keys `k` float32 [block, columns], those that are `there`."""
    kind = out.dtype.element_ty
    if STATISTIC == 0:
        low = tl.min(tl.where(there[:, None], k, float("inf")), 0)
        high = tl.max(tl.where(there[:, None], k, float("-inf")), 0)
        tl.store(out + c, tl.where(count > 0, low, 0).to(kind), mask=c < KEY)
        tl.store(out + KEY + c, tl.where(count > 0, high, 0).to(kind), mask=c < KEY)
    else:
        mean = tl.sum(tl.where(there[:, None], k, 0), 0) / tl.maximum(count, 1)
        tl.store(out + c, mean.to(kind), mask=c < KEY)
        if STATISTIC == 2:
            away = tl.where(there[:, None], k - mean[None, :], 0)
            deviation = tl.sqrt(tl.sum(away * away, 0) / tl.maximum(count, 1))
            tl.store(out + KEY + c, deviation.to(kind), mask=c < KEY)


@triton.jit
def _labels(
    rows, slot, live, group, head, channels, labels, ranges, slots, CHANNELS: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Labels of the keys at `rows` [N]."""
    half: tl.constexpr = CHANNELS // 2
    j = tl.arange(0, HALF)
    inside = live[:, None] & (j < half)[None, :]
    first_half = tl.load(channels + group * CHANNELS + j, mask=j < half, other=0)
    other_half = tl.load(channels + group * CHANNELS + half + j, mask=j < half, other=0)
    k0 = tl.load(rows[:, None] + first_half[None, :], mask=inside, other=0).to(tl.float32)
    k1 = tl.load(rows[:, None] + other_half[None, :], mask=inside, other=0).to(tl.float32)
    low = tl.min(tl.where(inside, tl.minimum(k0, k1), float("inf")), 1)
    high = tl.max(tl.where(inside, tl.maximum(k0, k1), float("-inf")), 1)
    step = tl.minimum(tl.div_rn(high - low, 15.0), 65504.0).to(tl.float16)
    low = tl.minimum(tl.maximum(low, -65504.0), 65504.0).to(tl.float16)
    at = head.to(tl.int64) * slots + slot
    tl.store(ranges + at * 2, step, mask=live)
    tl.store(ranges + at * 2 + 1, low, mask=live)
    unit, base = step.to(tl.float32), low.to(tl.float32)
    unit = tl.where(unit == 0, 1.0, unit)
    code0 = tl.floor(tl.div_rn(k0 - base[:, None], tl.broadcast_to(unit[:, None], k0.shape)) + 0.5)
    code1 = tl.floor(tl.div_rn(k1 - base[:, None], tl.broadcast_to(unit[:, None], k1.shape)) + 0.5)
    code0 = tl.minimum(tl.maximum(code0, 0.0), 15.0).to(tl.int32)
    code1 = tl.minimum(tl.maximum(code1, 0.0), 15.0).to(tl.int32)
    tl.store(labels + at[:, None] * half + j[None, :], (code0 | (code1 << 4)).to(tl.uint8), mask=inside)


@triton.jit
def index_token(
    part, b, group, head, end, keys, block_table, key_positions, channels, statistics, seen, labels, ranges, keys_b,
    keys_h, keys_s, positions_b, slots, blocks, host, KEY: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    STATISTIC: tl.constexpr, HAS_BLOCKS: tl.constexpr, HAS_LABELS: tl.constexpr, HOST: tl.constexpr, PDL: tl.constexpr,
    HALF: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Enter the token in the last slot: its block's statistics, BLOCK_K columns a `part`, and its label in part 0.

    The older keys of the block are read before the launch in front has ended.
    """
    new = end - 1
    n = new // BLOCK
    if PDL and block_table is not None:
        gdc_wait()
        gdc_launch_dependents()
    key_positions += b * positions_b
    if HAS_BLOCKS:
        slot = n * BLOCK + tl.arange(0, BLOCK)
        old = slot < tl.minimum(new, slots)
        position = tl.load(key_positions + slot, mask=old, other=-1)
        c = part * BLOCK_K + tl.arange(0, BLOCK_K)
        rows = _rows(slot, b, group, head, keys, block_table, keys_b, keys_h, keys_s, blocks, host, BLOCK, HOST)
        k = tl.load(rows[:, None] + c[None, :], mask=old[:, None] & (c < KEY)[None, :], other=0)
    at = new + tl.arange(0, 1)
    row = _rows(at, b, group, head, keys, block_table, keys_b, keys_h, keys_s, blocks, host, BLOCK, HOST)
    if PDL and block_table is None:
        gdc_wait()
        gdc_launch_dependents()
    live = (at >= 0) & (at < slots)
    if HAS_BLOCKS:
        newest = tl.load(key_positions + at, mask=live, other=-1)
        new_k = tl.load(row[:, None] + c[None, :], mask=live[:, None] & (c < KEY)[None, :], other=0)
        there = tl.where(slot == at, newest, position) >= 0
        k = tl.where((slot == at)[:, None], new_k, k).to(tl.float32)
        count = tl.sum(there.to(tl.int32), 0)
        width: tl.constexpr = KEY if STATISTIC == 1 else 2 * KEY
        if n < blocks:
            _statistics(k, there, count, statistics + (head.to(tl.int64) * blocks + n) * width, c, KEY, STATISTIC)
            if part == 0:
                tl.store(seen + head * blocks + n, count)
    if HAS_LABELS:  # noqa: SIM102  (resolved when the kernel is compiled)
        if part == 0:
            _labels(row, at, live, group, head, channels, labels, ranges, slots, CHANNELS, HALF)


@triton.jit(do_not_specialize=["slots", "blocks"])
def _index(
    keys, block_table, key_positions, start, filled, channels, statistics, seen, labels, ranges, keys_b, keys_h, keys_s,
    positions_b, slots, blocks, GROUPS: tl.constexpr, KEY: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    STATISTIC: tl.constexpr, HAS_BLOCKS: tl.constexpr, HAS_LABELS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    b, group = (head // GROUPS).to(tl.int64), head % GROUPS
    n, end = tl.load(start) // BLOCK + tl.program_id(0), tl.minimum(tl.load(filled), slots)
    if n * BLOCK < end:
        slot = n * BLOCK + tl.arange(0, BLOCK)
        live = slot < end
        rows = _rows(slot, b, group, head, keys, block_table, keys_b, keys_h, keys_s, blocks, None, BLOCK, 0)
        if HAS_BLOCKS:
            there = tl.load(key_positions + b * positions_b + slot, mask=live, other=-1) >= 0
            count = tl.sum(there.to(tl.int32), 0)
            tl.store(seen + head * blocks + n, count)
            width: tl.constexpr = KEY if STATISTIC == 1 else 2 * KEY
            out = statistics + (head.to(tl.int64) * blocks + n) * width
            for first in range(0, KEY, BLOCK_K):
                c = first + tl.arange(0, BLOCK_K)
                k = tl.load(rows[:, None] + c[None, :], mask=there[:, None] & (c < KEY)[None, :], other=0)
                _statistics(k.to(tl.float32), there, count, out, c, KEY, STATISTIC)
        if HAS_LABELS:
            _labels(rows, slot, live, group, head, channels, labels, ranges, slots, CHANNELS, HALF)
