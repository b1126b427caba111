"""Experts that a tree shares: those that its nodes together like best, and no others, are read.

    V_e = Σ_t w_te  over the nodes t whose router chose e;  the B experts of the largest V stay

A node whose expert goes takes what stays of its own choice, with weights that are scaled to the sum that they had where
the model's router makes the weights of its choice sum to 1 (MoE-Spec, https://arxiv.org/abs/2602.16052, "truncation").
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
    """Which experts a call leaves out."""

    def narrow(
        self, layer: int, chosen: Tensor, weights: Tensor, experts: int, is_node: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What stays of the choice of each token, anew.

        Args:
            layer: number of the layer, of those with experts.
            chosen: int64 `[T, k]`.
            weights: `[T, k]`.
            experts: E, of the layer.
            is_node: bool `[T]`: rows that are no padding.
        """


@dataclass(frozen=True)
class ExpertBudget:
    """How many experts of a layer one call reads.

    Attributes:
        share: of the layer's experts.
        rescales: weights that stay are scaled to the sum of all.
    """

    share: float
    rescales: bool

    def of(self, experts: int, each: int) -> int:
        """B: of a layer with so many `experts`, of which a token takes `each`; one token's always."""
        return min(experts, max(each, round(self.share * experts)))

    def narrow(
        self, layer: int, chosen: Tensor, weights: Tensor, experts: int, is_node: Tensor
    ) -> tuple[Tensor, Tensor]:
        kept = self.of(experts, chosen.shape[1])
        return share_experts(chosen, weights, is_node, experts, kept, self.rescales)


class Call(Protocol):
    """What a rule needs to know of the current call.

    Attributes:
        is_on: it leaves something out.
        is_node: bool `[T]`: rows that are nodes, and no padding.
    """

    is_on: bool
    is_node: Tensor


def expert_modules(model: Any) -> dict[str, nn.Module]:
    """The modules that get a choice of experts and its weights.

    Raises:
        ModelError: the model's experts have another form.
    """
    found = {name: module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == "experts"}
    for name, module in found.items():
        takes = len(inspect.signature(module.forward).parameters)  # hidden states, choice, weights
        if not isinstance(getattr(module, "num_experts", None), int) or takes != 3:
            raise ModelError(f"{name} ({type(module).__name__}) keeps its experts in another form")
    return found


def rescales(config: Any) -> bool:
    """Whether a model's router makes the weights of a token's choice sum to 1."""
    return bool(getattr(config.get_text_config(decoder=True), "norm_topk_prob", True))


@contextmanager
def attached(model: Any, rule: ExpertRule, call: Call) -> Iterator[None]:
    """Inside, tokens of `model` leave experts out in calls that are on."""

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
    """What stays of each token's choice; an expert that goes is another one's place, with weight 0.

    Args:
        chosen: int64 `[T, k]`, of each token.
        weights: `[T, k]`, likewise.
        is_node: bool `[T]`: whose choice counts.
        experts: E.
        kept: B, of which at least k.
        rescales: whether weights that stay are scaled to the sum of all.

    Returns:
        `chosen` and `weights` anew; a token of which nothing stays has weights of 0.
    """
    if kept >= experts:
        return chosen, weights
    wide = weights.float()
    # One place for each pair in a dense table, and a sum down its columns: the same bits whatever the order.
    table = torch.zeros(chosen.shape[0], experts, device=chosen.device)
    votes = table.scatter(1, chosen, wide * is_node[:, None]).sum(0)
    best = votes.topk(kept).indices
    stays = torch.zeros(experts, dtype=torch.bool, device=chosen.device).scatter(0, best, True)[chosen]
    return torch.where(stays, chosen, best[0]), weights_left(wide, stays, rescales).to(weights.dtype)


def weights_left(weights: Tensor, stays: Tensor, rescales: bool) -> Tensor:
    """Weights float32 `[T, k]` of the experts that stay, 0 of others; scaled to the sum of all where `rescales`."""
    left = torch.where(stays, weights, 0)
    if not rescales:
        return left
    # A token that keeps all of its experts has the very weights that it had.
    factor = torch.where(stays.all(1), 1.0, weights.sum(1) / left.sum(1).clamp(min=1e-20))
    return left * factor[:, None]
