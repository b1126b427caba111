"""Kernel of `index_keys`: the statistics of blocks of keys, and the labels of their tokens in four bits a channel.

A block is done anew whenever one of its slots was written. :mod:`effpass.lowering.kernels.two_level_attention` does the
block of a step's own token itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effpass.lowering.kernels.launch import launch_options, overlaps

__all__ = ["STATISTICS", "index_block", "index_keys", "indexable", "label_shape", "strides"]

STATISTICS = {"min_max": 0, "mean": 1, "mean_std": 2}


def indexable(keys: Tensor, channels: Tensor, labels: Tensor) -> bool:
    """Whether the kernels keep the index of `keys`: one of the GPU's types, labels of at least 32 channels."""
    return (
        keys.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and keys.stride(-1) == 1
        and (channels.shape[1] >= 32 or not labels.shape[2])
    )


def index_keys(
    keys: Tensor, block_table: Tensor | None, key_positions: Tensor, start: Tensor, filled: Tensor, tokens: int,
    channels: Tensor, statistics: Tensor, seen: Tensor, labels: Tensor, ranges: Tensor, block: int, statistic: str,
) -> None:  # fmt: skip
    """`effpass::index_keys` where :func:`indexable`."""
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
    """Of row, head and slot; with pages, of page and slot."""
    return keys.stride()[:3] if block_table is None else (keys.stride(0), 0, keys.stride(1))  # type: ignore[return-value]


def label_shape(of_label: int, key_size: int) -> dict[str, int]:
    half = max(16, triton.next_power_of_2(of_label // 2))
    chunk = min(128, max(16, triton.next_power_of_2(key_size)))
    return {"HALF": half, "TILE": max(16, min(512, 16384 // half)), "BLOCK_K": chunk}


def _no_overlap(device: torch.device) -> dict[str, bool]:
    return {"launch_pdl": False} if overlaps(device) else {}


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def index_block(
    n, b, group, head, end, keys, block_table, key_positions, channels, statistics, seen, labels, ranges, keys_b,
    keys_h, keys_s, positions_b, slots, blocks, host, KEY: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    STATISTIC: tl.constexpr, HAS_BLOCKS: tl.constexpr, HAS_LABELS: tl.constexpr, HOST: tl.constexpr,
    BLOCK_K: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Statistics and labels of block `n`, anew from its keys; HOST is the width of host's rows."""
    slot = n * BLOCK + tl.arange(0, BLOCK)
    live = slot < tl.minimum(end, slots)
    position = tl.load(key_positions + b * positions_b + slot, mask=live, other=-1)
    there = position >= 0
    if block_table is None:
        rows = keys + b * keys_b + group * keys_h + slot.to(tl.int64) * keys_s
    else:
        page = tl.load(block_table + head * blocks + n).to(tl.int64)
        rows = keys + page * keys_b + tl.arange(0, BLOCK).to(tl.int64) * keys_s
        if host is not None:
            far = host + (head.to(tl.int64) * blocks + n) * (BLOCK * HOST) + tl.arange(0, BLOCK) * HOST
            rows = tl.where(page >= 0, rows, far)
    if HAS_BLOCKS:
        count = tl.sum(there.to(tl.int32), 0)
        tl.store(seen + head * blocks + n, count)
        width: tl.constexpr = KEY if STATISTIC == 1 else 2 * KEY
        out = statistics + (head.to(tl.int64) * blocks + n) * width
        kind = statistics.dtype.element_ty
        for first in range(0, KEY, BLOCK_K):
            c = first + tl.arange(0, BLOCK_K)
            k = tl.load(rows[:, None] + c[None, :], mask=there[:, None] & (c < KEY)[None, :], other=0).to(tl.float32)
            if STATISTIC == 0:
                low = tl.min(tl.where(there[:, None], k, float("inf")), 0)
                high = tl.max(tl.where(there[:, None], k, float("-inf")), 0)
                tl.store(out + c, tl.where(count > 0, low, 0).to(kind), mask=c < KEY)
                tl.store(out + KEY + c, tl.where(count > 0, high, 0).to(kind), mask=c < KEY)
            else:
                mean = tl.sum(k, 0) / tl.maximum(count, 1)
                tl.store(out + c, mean.to(kind), mask=c < KEY)
                if STATISTIC == 2:
                    away = tl.where(there[:, None], k - mean[None, :], 0)
                    deviation = tl.sqrt(tl.sum(away * away, 0) / tl.maximum(count, 1))
                    tl.store(out + KEY + c, deviation.to(kind), mask=c < KEY)
    if HAS_LABELS:
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


@triton.jit(do_not_specialize=["slots", "blocks"])
def _index(
    keys, block_table, key_positions, start, filled, channels, statistics, seen, labels, ranges, keys_b, keys_h, keys_s,
    positions_b, slots, blocks, GROUPS: tl.constexpr, KEY: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    STATISTIC: tl.constexpr, HAS_BLOCKS: tl.constexpr, HAS_LABELS: tl.constexpr, HALF: tl.constexpr,
    TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    n, end = tl.load(start) // BLOCK + tl.program_id(0), tl.load(filled)
    if n * BLOCK < tl.minimum(end, slots):
        index_block(
            n, (head // GROUPS).to(tl.int64), head % GROUPS, head, end, keys, block_table, key_positions, channels,
            statistics, seen, labels, ranges, keys_b, keys_h, keys_s, positions_b, slots, blocks, None, KEY, CHANNELS,
            BLOCK, STATISTIC, HAS_BLOCKS, HAS_LABELS, 0, BLOCK_K, HALF,
        )  # fmt: skip
