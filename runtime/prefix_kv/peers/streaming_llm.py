"""StreamingLLM (https://arxiv.org/abs/2309.17453): keep the first tokens and a sliding window of the last ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from effpass.runtime.prefix_kv.policy import Policy

__all__ = ["StreamingLLM"]


class StreamingLLM(Policy):
    """Policy that keeps attention sinks and the most recent tokens in every layer.

    Tokens keep their original positions; they are not renumbered within the cache.
    """

    name = "streaming_llm"
    importance = "none"
    slides = True

    def shares(self, ratio: float, layers: int) -> Sequence[float]:
        return [1.0] * layers

    def rank(self, from_all: Tensor, from_last: Tensor, positions: Tensor, sink: int) -> Tensor:
        return positions.float()
