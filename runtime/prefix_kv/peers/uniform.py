"""Every layer keeps equally many tokens."""

from __future__ import annotations

from collections.abc import Sequence

from effpass.runtime.prefix_kv.policy import Policy

__all__ = ["Uniform"]


class Uniform(Policy):
    """Equal layers, by the attention that tokens receive from all others."""

    name = "uniform"
    importance = "full"

    def shares(self, ratio: float, layers: int) -> Sequence[float]:
        return [1.0] * layers
