"""A rule of sparse verification: all nodes of a tree share the feed-forward channels with the largest activations.

    v_c = Σ_t a_tc²  over the nodes t;  the channels with the largest v are read                 a: act(W_gate x)

The gate is computed for all channels, and determines which rows of W_up and columns of W_down are read
(:mod:`effpass.lowering.ops.chosen_channels`). A skipped channel would have contributed a · u with u = W_up x, which is
not computed; a² is the expected loss.
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

_PIECE = 16  # the number of channels that are read is a multiple of it, so that kernels load whole pieces


class ChannelRule(Protocol):
    """Interface of a rule for the channels that a call skips."""

    def run(self, network: Any, x: Tensor, is_node: Tensor) -> Tensor:
        """Compute the output `[..., D]` of a gated network.

        Args:
            network: feed-forward network, as :func:`gated_networks` finds it.
            x: `[..., D]`, input for T tokens.
            is_node: bool `[T]`, tokens that are nodes, and not padding.
        """


@dataclass(frozen=True)
class ChannelBudget:
    """Rule by which a call reads a fixed share of a network's channels.

    Attributes:
        share: share of the network's channels to read.
    """

    share: float

    def of(self, channels: int) -> int:
        """Return the number of channels M to read, of a network with `channels` channels."""
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
    """Return the channels with the largest sums of squares, int32 `[kept]`, ascending.

    Args:
        active: `[T, F]`, activated gate of each token.
        is_node: bool `[T]`, tokens that count.
        kept: number of channels M.
    """
    of_nodes = torch.where(is_node[:, None], active.float(), 0)
    return torch.ops.effpass.largest_channels(of_nodes.square().sum(0), kept)


def lay_by_channel(network: Any) -> None:
    """Change the memory layout of W_down, in place, such that the weights of each channel are contiguous."""
    weight = network.down_proj.weight
    weight.data = weight.data.t().contiguous().t()


def gated_networks(model: Any) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Find the feed-forward networks W_down (act(W_gate x) ∘ W_up x) that run on all tokens.

    Returns:
        The networks by name, and for each similar module that does not qualify the reason.
    """
    found: dict[str, nn.Module] = {}
    others: dict[str, str] = {}
    known: dict[type, bool] = {}
    for name, module in model.named_modules():
        if not all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            continue
        linears = [module.gate_proj, module.up_proj, module.down_proj]
        if not isinstance(module.up_proj, nn.Module):
            continue  # experts whose weights are stacked in one tensor
        if any(type(part) is not nn.Linear or type(part.weight) is not nn.Parameter for part in linears):
            others[name] = "its weights are quantized, or have adapters"
        elif any(part.bias is not None or part.weight.is_meta for part in linears[1:]):
            others[name] = "its products have a bias, or are not in memory"
        elif ".experts." not in f"{name}.":  # an expert runs on some of the tokens only
            if type(module) not in known:
                known[type(module)] = _is_plain(module)
            if known[type(module)]:
                found[name] = module
            else:
                others[name] = f"{type(module).__name__} computes something else"
    return found, others


@torch.no_grad()
def _is_plain(network: Any) -> bool:
    """Return whether the module computes just the formula of :func:`gated_networks`, tested on random input."""
    weight = network.up_proj.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.shape[1], generator=generator).to(weight)
    plain = network.down_proj(network.act_fn(network.gate_proj(x)) * network.up_proj(x))
    return torch.allclose(network(x), plain, rtol=1e-2, atol=1e-3 * float(plain.abs().max()))


@contextmanager
def attached(networks: Iterable[Any], rule: ChannelRule, call: Call) -> Iterator[None]:
    """Context in which `networks` skip channels by `rule`, in calls for which `call.is_on` is set."""

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
