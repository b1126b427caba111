"""Channels of feed-forward networks that a tree shares: those in which its nodes have most, and no others, are read.

    v_c = Σ_t a_tc²  over the nodes t;  the channels of the largest v stay                       a: act(W_gate x)

The gate is computed whole and decides which rows of W_up and columns of W_down are read
(:mod:`effpass.lowering.ops.chosen_channels`). A channel that goes would have added a · u, of which u is not known: what
is lost in expectation is a².
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import effpass.lowering.ops.chosen_channels  # noqa: F401  (registers the operator)
from effpass.runtime.speculative.shared_experts import Call

__all__ = ["ChannelBudget", "ChannelRule", "attached", "gated_networks", "lay_by_channel", "share_channels"]

_PIECE = 16  # channels that go or stay are a multiple of it, for loads of whole pieces


class ChannelRule(Protocol):
    """Which channels a call leaves out."""

    def run(self, network: Any, x: Tensor, is_node: Tensor) -> Tensor:
        """Output `[..., D]` of a gated network for `x` `[..., D]`; `is_node` bool `[T]`, of its rows."""


@dataclass(frozen=True)
class ChannelBudget:
    """How many channels of a network one call reads.

    Attributes:
        share: of the network's channels.
    """

    share: float

    def of(self, channels: int) -> int:
        """M: of a network with so many."""
        kept = max(1, round(self.share * channels))
        return kept if kept < _PIECE or kept == channels else kept - kept % _PIECE

    def run(self, network: Any, x: Tensor, is_node: Tensor) -> Tensor:
        channels = network.up_proj.out_features
        kept = self.of(channels)
        if kept >= channels:
            return type(network).forward(network, x)
        rows = x.flatten(0, -2)
        active = network.act_fn(network.gate_proj(rows))
        chosen = share_channels(active, is_node, kept)
        up, down = network.up_proj.weight, network.down_proj.weight
        return torch.ops.effpass.chosen_channels(rows, active, up, down, chosen).view(x.shape)


def share_channels(active: Tensor, is_node: Tensor, kept: int) -> Tensor:
    """Channels that stay, int32 `[kept]`, ascending.

    Args:
        active: `[T, F]`, the gate's output behind its activation.
        is_node: bool `[T]`: whose channels count.
        kept: M.
    """
    of_nodes = torch.where(is_node[:, None], active.float(), 0)
    return torch.ops.effpass.largest_channels(of_nodes.square().sum(0), kept)


def lay_by_channel(network: Any) -> None:
    """Let W_down lie in memory channel by channel, as the same weight: what reads a channel reads one piece."""
    weight = network.down_proj.weight
    weight.data = weight.data.t().contiguous().t()


def gated_networks(model: Any) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Networks W_down (act(W_gate x) ∘ W_up x) of `model` that all tokens go through, and why others are none."""
    found: dict[str, nn.Module] = {}
    others: dict[str, str] = {}
    known: dict[type, bool] = {}
    for name, module in model.named_modules():
        if not all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            continue
        linears = [module.gate_proj, module.up_proj, module.down_proj]
        if not isinstance(module.up_proj, nn.Module):
            continue  # experts, which keep all their weights in one
        if any(type(part) is not nn.Linear or type(part.weight) is not nn.Parameter for part in linears):
            others[name] = "its weights are quantised, or have adapters"
        elif any(part.bias is not None or part.weight.is_meta for part in linears[1:]):
            others[name] = "its products have a bias, or are not in memory"
        elif ".experts." not in f"{name}.":  # an expert sees some tokens only
            if type(module) not in known:
                known[type(module)] = _is_plain(module)
            if known[type(module)]:
                found[name] = module
            else:
                others[name] = f"{type(module).__name__} computes something else"
    return found, others


@torch.no_grad()
def _is_plain(network: Any) -> bool:
    weight = network.up_proj.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.shape[1], generator=generator).to(weight)
    plain = network.down_proj(network.act_fn(network.gate_proj(x)) * network.up_proj(x))
    return torch.allclose(network(x), plain, rtol=1e-2, atol=1e-3 * float(plain.abs().max()))


@contextmanager
def attached(networks: Iterable[Any], rule: ChannelRule, call: Call) -> Iterator[None]:
    """Inside, `networks`, as :func:`gated_networks` finds them, leave channels out in calls that are on."""

    def within(network: Any) -> Any:
        def forward(x: Tensor) -> Tensor:
            return rule.run(network, x, call.is_node) if call.is_on else type(network).forward(network, x)

        return forward

    networks = list(networks)
    for network in networks:
        network.forward = within(network)
    try:
        yield
    finally:
        for network in networks:
            del network.forward
