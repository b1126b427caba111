"""Scores of tokens from their labels, the second level of `effpass::two_level_attention`; functions for Triton kernels.

    t_s = Σ_h Σ_c q_hc (low_s + step_s · label_sc) = low_s Σ_c q_c + step_s Σ_c q_c label_sc      with q_c = Σ_h q_hc

h runs over the query heads that share a KV head, and c over the channels of a label. The sums q_c are computed once, by
the first launch of a step (`write_wanted`). If the maximum over the query heads is wanted instead of the sum, the heads
are the columns of a matrix product. Scores are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["label_query", "label_scores", "write_wanted"]


@triton.jit
def _of_channels(
    query, channels, b, group, query_b, query_h, REPEAT: tl.constexpr, BLOCK_R: tl.constexpr, CHANNELS: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """The query's channels of a label in halves, [R, C/2]."""
    half: tl.constexpr = CHANNELS // 2
    r, j = tl.arange(0, BLOCK_R), tl.arange(0, HALF)
    inside = (r < REPEAT)[:, None] & (j < half)[None, :]
    heads_of = query + b * query_b + (group * REPEAT + r) * query_h
    first_half = tl.load(channels + group * CHANNELS + j, mask=j < half, other=0)
    other_half = tl.load(channels + group * CHANNELS + half + j, mask=j < half, other=0)
    q0 = tl.load(heads_of[:, None] + first_half[None, :], mask=inside, other=0)
    q1 = tl.load(heads_of[:, None] + other_half[None, :], mask=inside, other=0)
    return q0, q1


@triton.jit
def write_wanted(
    wanted, query, channels, b, group, head, query_b, query_h, REPEAT: tl.constexpr, BLOCK_R: tl.constexpr,
    CHANNELS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """What labels are multiplied with, float32 [C]: the query's channels, summed over the heads that share keys."""
    half: tl.constexpr = CHANNELS // 2
    j = tl.arange(0, HALF)
    q0, q1 = _of_channels(query, channels, b, group, query_b, query_h, REPEAT, BLOCK_R, CHANNELS, HALF)
    tl.store(wanted + head * CHANNELS + j, tl.sum(q0.to(tl.float32), 0), mask=j < half)
    tl.store(wanted + head * CHANNELS + half + j, tl.sum(q1.to(tl.float32), 0), mask=j < half)


@triton.jit
def label_query(
    wanted, query, channels, b, group, head, query_b, query_h, REPEAT: tl.constexpr, BLOCK_R: tl.constexpr,
    CHANNELS: tl.constexpr, MAX: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """What labels are multiplied with, in halves, and its sum: [C/2] and [], or of each head [R, C/2] and [R]."""
    if MAX:
        q0, q1 = _of_channels(query, channels, b, group, query_b, query_h, REPEAT, BLOCK_R, CHANNELS, HALF)
        return q0, q1, tl.sum(q0.to(tl.float32), 1) + tl.sum(q1.to(tl.float32), 1)
    else:
        half: tl.constexpr = CHANNELS // 2
        j = tl.arange(0, HALF)
        q0 = tl.load(wanted + head * CHANNELS + j, mask=j < half, other=0)
        q1 = tl.load(wanted + head * CHANNELS + half + j, mask=j < half, other=0)
        return q0, q1, tl.sum(q0 + q1, 0)


@triton.jit
def label_scores(
    q0, q1, q_sum, slot, live, head, labels, ranges, slots, REPEAT: tl.constexpr, BLOCK_R: tl.constexpr,
    CHANNELS: tl.constexpr, MAX: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Of the labels in `slot` [N], where `live`."""
    half: tl.constexpr = CHANNELS // 2
    j = tl.arange(0, HALF)
    at = head.to(tl.int64) * slots + slot
    code = tl.load(labels + at[:, None] * half + j[None, :], mask=live[:, None] & (j < half)[None, :], other=0)
    step = tl.load(ranges + at * 2, mask=live, other=0).to(tl.float32)
    low = tl.load(ranges + at * 2 + 1, mask=live, other=0).to(tl.float32)
    if MAX:
        found = tl.dot((code & 15).to(q0.dtype), tl.trans(q0), input_precision="ieee")
        found = tl.dot((code >> 4).to(q0.dtype), tl.trans(q1), found, input_precision="ieee")
        found = found * step[:, None] + low[:, None] * q_sum[None, :]
        return tl.max(tl.where((tl.arange(0, BLOCK_R) < REPEAT)[None, :], found, float("-inf")), 1)
    else:
        # A code placed in the top bits of the mantissa of 1.0 gives 1 + code / 16, without a costly conversion.
        first = (((code & 15).to(tl.int32) << 19) | 0x3F800000).to(tl.float32, bitcast=True)
        other = (((code >> 4).to(tl.int32) << 19) | 0x3F800000).to(tl.float32, bitcast=True)
        found = tl.sum(first * q0[None, :] + other * q1[None, :], 1) - q_sum
        return found * (16 * step) + low * q_sum
