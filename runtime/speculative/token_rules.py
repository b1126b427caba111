"""What single tokens leave out: the rules of "Accelerate Speculative Decoding with Sparse Computation in Verification".

    experts    the m of lowest weight go where their share of the token's weights is below β_m; of all m up to a most,
               the largest;  β_m: the median of that share over texts, for each layer
    channels   those with |a_c| < τ                                                                 a: act(W_gate x)

https://arxiv.org/abs/2512.21911, sections on feed-forward networks and experts. Tokens of a tree leave out different
ones, so that together they read nearly all: rules for a whole tree are compared with these, which save no time.
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
    """How many of its experts a token leaves out.

    Attributes:
        most: experts.
        shares: β_1 ... β_{k-1} of each layer of experts, in their order.
        rescales: weights that stay are scaled to the sum of all.
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
        for m, (tail, limit) in enumerate(zip(tails, self.shares[layer], strict=False), 1):  # as many as may go
            goes = torch.where(tail < limit, m, goes)
        rank = wide.argsort(dim=1, stable=True).argsort(dim=1)
        stays = rank >= goes[:, None]
        left = weights_left(wide, stays, self.rescales)
        best = chosen.gather(1, wide.argmax(1, keepdim=True))  # stands in for what goes, with weight 0
        return torch.where(stays, chosen, best), left.to(weights.dtype)


def tail_shares(weights: Tensor) -> Tensor:
    """Shares that the 1, 2, ... k - 1 lowest of each token's `weights` `[T, k]` have of its sum, `[T, k - 1]`."""
    ascending = weights.float().sort(dim=1).values
    return ascending.cumsum(1)[:, :-1] / ascending.sum(1, keepdim=True).clamp(min=1e-20)


@dataclass(frozen=True)
class TokenChannels:
    """Which channels a token leaves out.

    Attributes:
        least: τ, of the gate's output behind its activation.
    """

    least: float

    def run(self, network: Any, x: Tensor, is_node: Tensor) -> Tensor:
        active = network.act_fn(network.gate_proj(x))
        active = torch.where(active.abs() < self.least, 0, active)
        return network.down_proj(active * network.up_proj(x))
