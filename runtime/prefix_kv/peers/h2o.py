"""H2O (https://arxiv.org/abs/2306.14048): tokens that received most attention, and as many of the last."""

from __future__ import annotations

from effpass.runtime.prefix_kv.peers.uniform import Uniform

__all__ = ["H2O"]


class H2O(Uniform):
    """Half heavy hitters, half recent tokens, in every layer.

    One set of tokens for all heads of a layer; while decoding, the sums of the prompt are kept and not added to.
    """

    name = "h2o"

    def recent(self, count: int, at_least: int) -> int:
        return max(at_least, count // 2)
