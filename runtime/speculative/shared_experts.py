"""A rule of sparse verification: all nodes of a tree share the experts with the largest total routing weight.

    V_e = Σ_t w_te  over the nodes t that are routed to e;  the B experts with the largest V are read

w_te is the weight that the router gives expert e for node t. A node whose expert is not read keeps the rest of its own
experts. If the model's router normalizes the weights of a token to the sum 1, the remaining weights are scaled to the
sum that all had (MoE-Spec, https://arxiv.org/abs/2602.16052, "truncation").
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from effpass.core.errors import ModelError

__all__ = [
    "Call",
    "ExpertBudget",
    "ExpertRule",
    "attached",
    "expert_modules",
    "rescales",
    "share_experts",
    "weights_left",
]


class ExpertRule(Protocol):
    """Interface of a rule for the experts that a call skips."""

    def narrow(
        self, layer: int, chosen: Tensor, weights: Tensor, experts: int, is_node: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return new experts `[T, k]` and weights `[T, k]` of each token, in which skipped experts have weight 0.

        Args:
            layer: index of the layer among those with experts.
            chosen: int64 `[T, k]`, experts that each token is routed to.
            weights: `[T, k]`, their routing weights.
            experts: number of experts E of the layer.
            is_node: bool `[T]`, tokens that are nodes, and not padding.
        """


@dataclass(frozen=True)
class ExpertBudget:
    """Rule by which a call reads a fixed share of a layer's experts.

    Attributes:
        share: share of the layer's experts to read.
        rescales: whether the remaining weights of a token are scaled to the sum that all had.
    """

    share: float
    rescales: bool

    def of(self, experts: int, each: int) -> int:
        """Return B for a layer with `experts` experts; at least the `each` experts that one token is routed to."""
        return min(experts, max(each, round(self.share * experts)))

    def narrow(
        self, layer: int, chosen: Tensor, weights: Tensor, experts: int, is_node: Tensor
    ) -> tuple[Tensor, Tensor]:
        kept = self.of(experts, chosen.shape[1])
        return share_experts(chosen, weights, is_node, experts, kept, self.rescales)


class Call(Protocol):
    """State of the current call of the model that rules depend on.

    Attributes:
        is_on: whether the call is sparse.
        is_node: bool `[T]`, tokens that are nodes, and not padding.
    """

    is_on: bool
    is_node: Tensor


def expert_modules(model: Any) -> dict[str, nn.Module]:
    """Return the modules, by name, whose inputs are hidden states, chosen experts and routing weights.

    Raises:
        ModelError: if the model's experts have another form.
    """
    found = {name: module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == "experts"}
    for name, module in found.items():
        takes = len(inspect.signature(module.forward).parameters)  # hidden states, chosen experts, routing weights
        if not isinstance(getattr(module, "num_experts", None), int) or takes != 3:
            raise ModelError(f"{name} ({type(module).__name__}) keeps its experts in another form")
    return found


def rescales(config: Any) -> bool:
    """Return whether a model's router normalizes the weights of a token's experts to the sum 1."""
    return bool(getattr(config.get_text_config(decoder=True), "norm_topk_prob", True))


@contextmanager
def attached(model: Any, rule: ExpertRule, call: Call) -> Iterator[None]:
    """Context in which tokens skip experts of `model` by `rule`, in calls for which `call.is_on` is set."""

    def within(layer: int) -> Any:
        def narrow(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not call.is_on:
                return None
            hidden, chosen, weights = args
            return hidden, *rule.narrow(layer, chosen, weights, module.num_experts, call.is_node)

        return narrow

    modules = expert_modules(model).values()
    handles = [module.register_forward_pre_hook(within(layer)) for layer, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def share_experts(
    chosen: Tensor, weights: Tensor, is_node: Tensor, experts: int, kept: int, rescales: bool
) -> tuple[Tensor, Tensor]:
    """Restrict each token's experts to the B experts with the largest total weight.

    Args:
        chosen: int64 `[T, k]`, experts that each token is routed to.
        weights: `[T, k]`, their routing weights.
        is_node: bool `[T]`, tokens whose weights count.
        experts: number of experts E of the layer.
        kept: number of experts B to read, at least k.
        rescales: whether the remaining weights of a token are scaled to the sum that all had.

    Returns:
        New `chosen` and `weights`. A skipped expert is replaced by one that is read, with weight 0; a token without a
        remaining expert has only weights of 0.
    """
    if kept >= experts:
        return chosen, weights
    wide = weights.float()
    # A dense table with one entry per pair, summed over tokens, is deterministic, unlike a scatter with atomic adds.
    table = torch.zeros(chosen.shape[0], experts, device=chosen.device)
    votes = table.scatter(1, chosen, wide * is_node[:, None]).sum(0)
    best = votes.topk(kept).indices
    stays = torch.zeros(experts, dtype=torch.bool, device=chosen.device).scatter(0, best, True)[chosen]
    return torch.where(stays, chosen, best[0]), weights_left(wide, stays, rescales).to(weights.dtype)


def weights_left(weights: Tensor, stays: Tensor, rescales: bool) -> Tensor:
    """Set the weights float32 `[T, k]` of skipped experts to 0, and scale the rest to the former sum if `rescales`."""
    left = torch.where(stays, weights, 0)
    if not rescales:
        return left
    # The factor is exactly 1 for tokens that keep all of their experts.
    factor = torch.where(stays.all(1), 1.0, weights.sum(1) / left.sum(1).clamp(min=1e-20))
    return left * factor[:, None]
