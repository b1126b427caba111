"""PrefixKV (https://arxiv.org/abs/2412.03409) with a profile: each layer's share, learned before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from effpass.runtime.prefix_kv.policy import Policy, pooled
from effpass.runtime.prefix_kv.profile import Profile

__all__ = ["PrefixKV"]


class PrefixKV(Policy):
    """The global threshold search, by a profile or, without one, for each prompt.

    Args:
        profile: shares of the layers, learned on other prompts. It lets every layer give up its tokens as soon as it
            has attended.
        importance: whose attention counts: that of all tokens, as in the paper, of the last 64, or both alike.
        pool: neighbours over which it is averaged, an odd number, so that what stands side by side is kept together;
            1 leaves it as it is, as in the paper.
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
