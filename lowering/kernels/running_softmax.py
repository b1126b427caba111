"""Online softmax over tiles of cache slots: the step that the attention kernels repeat.

    m' = max(m, max_n s_n)     f = 2^(m − m')     l' = f l + Σ_n 2^(s_n − m')     o' = f o + Σ_n 2^(s_n − m') v_n

s_n = log₂(e) · c(scale · q · k_n) is the score of slot n in powers of two; c(x) = softcap · tanh(x / softcap), or the
identity if there is no softcap. Each row of a tile is a query with its highest score m (`best`), sum of weights l
(`total`) and weighted sum of values o (`out`), all in float32; the attention output is o / l. Matrix products
accumulate in float32 without TF32, and weights are rounded to the dtype of the values before they are multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["accumulate", "scaled", "scores", "update"]


@triton.jit
def update(
    q, k, v, of_keys, of_queries, best, total, out, scale, softcap, window, MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Highest score, sum of weights and weighted sum of values of each row, with one more tile of slots.

    Scores are in powers of two. `best` starts at a finite number, so that rows that see nothing stay free of NaN.

    Args:
        q: [R, K].
        k: [K, N].
        v: [N, V].
        of_keys: positions [N], read where MASKED.
        of_queries: positions [R], read where MASKED.
        best: [R], the highest score so far.
        total: [R], the sum of weights so far.
        out: [R, V], the weighted sum of values so far.
    """
    score = scores(q, k, scale, softcap, SOFTCAP)
    if MASKED:
        visible = (of_keys >= 0)[None, :] & (of_keys[None, :] <= of_queries[:, None])
        if WINDOW:
            visible = visible & (of_queries[:, None] - of_keys[None, :] < window)
        score = tl.where(visible, score, float("-inf"))
    return accumulate(score, v, best, total, out)


@triton.jit
def scores(q, k, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores [R, N] of q [R, K] and k [K, N], in powers of two."""
    return scaled(tl.dot(q, k, input_precision="ieee"), scale, softcap, SOFTCAP)


@triton.jit
def scaled(score, scale, softcap, SOFTCAP: tl.constexpr):
    """Products of queries and keys as scores in powers of two."""
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        return softcap * 1.4426950408889634 * (1 - 2 / (tl.exp(score * (2 * scale / softcap)) + 1))
    else:
        return score * (scale * 1.4426950408889634)


@triton.jit
def accumulate(score, v, best, total, out):
    """`update` of scores [R, N] that are -inf where nothing is seen."""
    higher = tl.maximum(best, tl.max(score, 1))
    weight = tl.exp2(score - higher[:, None])
    fade = tl.exp2(best - higher)
    total = total * fade + tl.sum(weight, 1)
    return higher, total, tl.dot(weight.to(v.dtype), v, out * fade[:, None], input_precision="ieee")
