"""Rules by which each token skips experts and channels on its own.

    experts    skip the m experts of smallest weight, with the largest m up to a maximum for which their share of the
               token's weights is below β_m;  β_m: median of that share over texts, for each layer
    channels   skip those with |a_c| < τ                                                            a: act(W_gate x)

These are the rules of "Accelerate Speculative Decoding with Sparse Computation in Verification"
(https://arxiv.org/abs/2512.21911, sections on feed-forward networks and experts). The tokens of a tree skip different
experts and channels, and together read nearly all of them, so that no time is saved. The rules serve as a baseline for
those that all nodes of a tree share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effpass.runtime.speculative.shared_experts import weights_left

__all__ = ["TokenChannels", "TokenExperts", "tail_shares"]


@dataclass(frozen=True)
class TokenExperts:
    """Rule by which a token skips its experts with small weights.

    Attributes:
        most: maximum number of experts that a token skips.
        shares: β_1 ... β_{k-1} of each layer with experts, in the order of the layers.
        rescales: whether the remaining weights of a token are scaled to the sum that all had.
    """

    most: int
    shares: tuple[tuple[float, ...], ...]
    rescales: bool

    def narrow(
        self, layer: int, chosen: Tensor, weights: Tensor, experts: int, is_node: Tensor
    ) -> tuple[Tensor, Tensor]:
        wide = weights.float()
        tails = tail_shares(wide).unbind(1)[: self.most]
        goes = torch.zeros(len(wide), dtype=torch.long, device=wide.device)
        for m, (tail, limit) in enumerate(zip(tails, self.shares[layer], strict=False), 1):  # up to `most`
            goes = torch.where(tail < limit, m, goes)
        rank = wide.argsort(dim=1, stable=True).argsort(dim=1)
        stays = rank >= goes[:, None]
        left = weights_left(wide, stays, self.rescales)
        best = chosen.gather(1, wide.argmax(1, keepdim=True))  # replaces skipped experts, with weight 0
        return torch.where(stays, chosen, best), left.to(weights.dtype)


def tail_shares(weights: Tensor) -> Tensor:
    """Return the shares of the 1, 2, ... k - 1 smallest `weights` `[T, k]` of each token in its sum, `[T, k - 1]`."""
    ascending = weights.float().sort(dim=1).values
    return ascending.cumsum(1)[:, :-1] / ascending.sum(1, keepdim=True).clamp(min=1e-20)


@dataclass(frozen=True)
class TokenChannels:
    """Rule by which a token skips channels with small gates.

    Attributes:
        least: threshold τ on the magnitude of the activated gate.
    """

    least: float

    def run(self, network: Any, x: Tensor, is_node: Tensor) -> Tensor:
        active = network.act_fn(network.gate_proj(x))
        active = torch.where(active.abs() < self.least, 0, active)
        return network.down_proj(active * network.up_proj(x))
