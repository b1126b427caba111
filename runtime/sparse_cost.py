"""From what length on sparse attention pays: the cost model's equation, solved for the length.

dense(S)  = latency + B S R / bandwidth                                  R bytes of keys and values of a token
sparse(S) = launches latency + B (S I + C L + k R) / bandwidth           I of the index that is read for each token,
                                                                         C candidates with labels of L, k attended
"""

from __future__ import annotations

import math

from effpass.core.roofline import Ceilings
from effpass.lowering.ops.two_level_attention_index import STATISTICS, Selection

__all__ = ["break_even", "step_bytes"]


def step_bytes(
    how: Selection, length: int, groups: int, key_size: int, value_size: int, channels: int, element: int, latent: bool
) -> tuple[int, int]:
    """Bytes that one sequence's step reads of a layer, dense and sparse.

    Args:
        how: what is chosen.
        length: tokens S.
        groups: key-value heads G.
        key_size: K; of latents all of it.
        value_size: V.
        channels: of a label.
        element: bytes of a number of the cache.
        latent: values are part of the keys.
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
    """Tokens from which on a step of one sequence is faster sparse; no less than it attends to."""
    launches = 2 if how.levels == "blocks" else 3

    def gain(length: int) -> float:
        dense, sparse = step_bytes(how, length, groups, key_size, value_size, channels, element, latent)
        return (dense - sparse) / at.bandwidth - (launches - 1) * at.latency["attention"]

    low, high = how.tokens, 1 << 30
    if gain(high) <= 0:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if gain(middle) > 0 else (middle, high)
    return high
