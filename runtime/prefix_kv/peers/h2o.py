"""H2O (https://arxiv.org/abs/2306.14048): keep the tokens that received most attention and as many recent ones."""

from __future__ import annotations

from effpass.runtime.prefix_kv.peers.uniform import Uniform

__all__ = ["H2O"]


class H2O(Uniform):
    """Policy that keeps half heavy hitters and half recent tokens in every layer.

    All heads of a layer keep the same tokens. Attention is summed over the prompt only, and not while decoding.
    """

    name = "h2o"

    def recent(self, count: int, at_least: int) -> int:
        return max(at_least, count // 2)
