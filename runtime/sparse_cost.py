"""Cost model of sparse attention in a decode step, and the length from which on it is faster than dense attention.

    dense(S)  = latency + S R / (rate · bandwidth)
    sparse(S) = chain · latency + (S I + C L + k R) / bandwidth

with a sequence of S tokens, R bytes of keys and values per token, I bytes of the index that are read per token, C
candidate keys with labels of L bytes each, and k keys that are attended to. `latency` is the time of one small
attention kernel; latency and bandwidth are measured (:mod:`effpass.core.roofline`). `chain` is the time of the sparse
kernels without their bytes, in such latencies: the steps of each depend on one another. `rate` is the share of the
bandwidth at which the dense kernel reads. Both are from steps that were measured on an H200 (rows of area
`sparse_attention`), in latencies of 6.7 µs.
"""

from __future__ import annotations

import math

from effpass.core.roofline import Ceilings
from effpass.lowering.ops.two_level_attention_index import STATISTICS, Selection

__all__ = ["break_even", "step_bytes"]

# By the levels of the choice, for heads and for latents.
_CHAIN = {"blocks": (2.1, 5.5), "tokens": (6.6, 13.1), "both": (3.6, 7.2)}
_RATE_OF_LATENTS = 0.66  # bound by its matrix products


def step_bytes(
    how: Selection, length: int, groups: int, key_size: int, value_size: int, channels: int, element: int, latent: bool
) -> tuple[int, int]:
    """Return the bytes that a decode step of one sequence reads in one layer, with dense and with sparse attention.

    Args:
        how: settings of the choice of keys.
        length: number of tokens S in the cache.
        groups: number of KV heads G.
        key_size: key size K; for latents, the size of the latent and the rotated part together.
        value_size: value size V.
        channels: number of channels of a label.
        element: size of a cache element in bytes.
        latent: whether values are part of the keys (MLA).
    """
    row = groups * (key_size if latent else key_size + value_size) * element
    label = groups * (channels // 2 + 4)
    of_blocks = groups * (STATISTICS[how.statistic] * key_size * element + 4) * math.ceil(length / how.block)
    if how.levels == "blocks":
        return length * row, of_blocks + min(how.kept_blocks * how.block, length) * row
    if how.levels == "tokens":
        return length * row, length * label + min(how.tokens, length) * row
    candidates = min(how.blocks * how.block, length)
    return length * row, of_blocks + candidates * label + min(how.tokens, length) * row


def break_even(
    how: Selection,
    groups: int,
    key_size: int,
    value_size: int,
    channels: int,
    element: int,
    latent: bool,
    at: Ceilings,
) -> int:
    """Return the smallest number of tokens at which a sparse step of one sequence is faster than a dense one.

    It is not less than the number of tokens that a sparse step attends to, and 2³⁰ if sparse attention is never faster.
    The other arguments are those of :func:`step_bytes`.

    Args:
        at: measured bandwidth and latency of the device.
    """
    rate = _RATE_OF_LATENTS if latent else 1.0
    more = (_CHAIN[how.levels][latent] - 1) * at.latency["attention"]

    def gain(length: int) -> float:
        dense, sparse = step_bytes(how, length, groups, key_size, value_size, channels, element, latent)
        return (dense / rate - sparse) / at.bandwidth - more

    low, high = how.tokens, 1 << 30
    if gain(high) <= 0:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if gain(middle) > 0 else (middle, high)
    return high
