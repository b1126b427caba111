"""PyramidKV (https://arxiv.org/abs/2406.02069): SnapKV, where each layer keeps fewer tokens than the one before it."""

from __future__ import annotations

from collections.abc import Sequence

from effpass.runtime.prefix_kv.peers.snap_kv import SnapKV

__all__ = ["PyramidKV"]

_BETA = 20  # the last layer keeps 1 / 20 of the mean


class PyramidKV(SnapKV):
    """Policy whose layers keep an arithmetic sequence of tokens, from 2 - 1/20 times the mean down to 1/20 of it."""

    name = "pyramid_kv"

    def shares(self, ratio: float, layers: int) -> Sequence[float]:
        last, first = 1 / _BETA, 2 - 1 / _BETA
        return [first + (last - first) * layer / max(1, layers - 1) for layer in range(layers)]
