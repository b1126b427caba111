"""SnapKV (https://arxiv.org/abs/2404.14469): what the prompt's last tokens look at."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from effpass.runtime.prefix_kv.policy import Policy, pooled

__all__ = ["SnapKV"]


class SnapKV(Policy):
    """Attention from the last 64 tokens, averaged over 7 neighbours; equal layers.

    One set of tokens for all heads of a layer. The window itself stays, up to half of what a layer keeps.
    """

    name = "snap_kv"
    importance = "window"
    window = 64

    def shares(self, ratio: float, layers: int) -> Sequence[float]:
        return [1.0] * layers

    def rank(self, received: Tensor, asked: Tensor, positions: Tensor, sink: int) -> Tensor:
        return pooled(asked, 7)

    def recent(self, count: int, recent: int) -> int:
        return max(recent, min(self.window, count // 2))
