"""Uniform budget: every layer keeps the same number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from effpass.runtime.prefix_kv.policy import Policy

__all__ = ["Uniform"]


class Uniform(Policy):
    """Policy with equal shares of all layers, which ranks tokens by the attention that they receive from all tokens."""

    name = "uniform"
    importance = "full"

    def shares(self, ratio: float, layers: int) -> Sequence[float]:
        return [1.0] * layers
