"""SnapKV (https://arxiv.org/abs/2404.14469): keep the tokens that the prompt's last tokens attend to."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from effpass.runtime.prefix_kv.policy import Policy, pooled

__all__ = ["SnapKV"]


class SnapKV(Policy):
    """Ranks tokens by the attention that the last `window` tokens pay them, averaged over `kernel` positions.

    Every layer keeps equally many tokens, and all heads of a layer the same ones, since they share the slots of one
    cache. The window itself is kept, up to half of what a layer keeps.
    """

    name = "snap_kv"
    importance = "window"
    window = 64
    kernel = 7

    def shares(self, ratio: float, layers: int) -> Sequence[float]:
        return [1.0] * layers

    def rank(self, from_all: Tensor, from_last: Tensor, positions: Tensor, sink: int) -> Tensor:
        return pooled(from_last, self.kernel)

    def recent(self, count: int, at_least: int) -> int:
        return max(at_least, min(self.window, count // 2))
