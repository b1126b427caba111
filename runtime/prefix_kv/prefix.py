"""PrefixKV (https://arxiv.org/abs/2412.03409), optionally with a profile.

A profile (:mod:`effpass.runtime.prefix_kv.profile`) holds the share of its tokens that each layer keeps, learned on
other prompts. Without one, the global threshold search of :mod:`effpass.runtime.prefix_kv.search` runs for each prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from effpass.runtime.prefix_kv.policy import Policy, pooled
from effpass.runtime.prefix_kv.profile import Profile

__all__ = ["PrefixKV"]


class PrefixKV(Policy):
    """Policy of PrefixKV: shares of the layers from a profile, or from the global threshold search for each prompt.

    Args:
        profile: shares of the layers, learned on other prompts. As they are known beforehand, each layer can evict its
            tokens as soon as it has attended to the prompt. None to search for each prompt.
        importance: tokens whose attention is the score: all tokens (``"full"``, as in the paper), the last 64
            (``"window"``), or both with equal weight.
        pool: width of the window over which scores of neighboring tokens are averaged, an odd number, so that
            neighbors tend to be kept together; 1 for no averaging, as in the paper.
    """

    def __init__(
        self, profile: Profile | None = None, importance: Literal["full", "window", "both"] = "both", pool: int = 7
    ) -> None:
        self.profile = profile
        self.importance = importance
        self.pool = pool

    def shares(self, ratio: float, layers: int) -> Sequence[float] | None:
        return None if self.profile is None else self.profile.at(ratio)

    def rank(self, from_all: Tensor, from_last: Tensor, positions: Tensor, sink: int) -> Tensor:
        ranks = super().rank(from_all, from_last, positions, sink)
        return ranks if self.pool == 1 else pooled(ranks, self.pool)
