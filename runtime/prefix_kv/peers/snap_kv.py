"""SnapKV (https://arxiv.org/abs/2404.14469): keep the tokens to which the last tokens of the prompt attend most."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from effpass.runtime.prefix_kv.policy import Policy, pooled

__all__ = ["SnapKV"]


class SnapKV(Policy):
    """Policy that ranks tokens by the attention from the last `window` tokens, averaged over `kernel` positions.

    Every layer keeps the same number of tokens, and all heads of a layer keep the same ones, as they share the slots of
    the cache. The window itself is always kept, up to half of the tokens that a layer keeps.
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
