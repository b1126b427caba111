"""Masks on the units of a model: one factor per unit, by which the output of the unit is multiplied.

    effective = τ · soft + (1 − τ) · hard

`soft` is learned, in [0, 1]; `hard` is 1 for the units to keep and 0 for the others. The softness τ is 1 while masks
are learned and falls to 0 while the learner closes the model (:mod:`effpass.trainers.pruning.minimax`). With τ = 0 the
model computes the same outputs as the cut model. The gradient of `soft` is that of the effective mask
(straight-through estimator), also for units whose effective mask is 0.

The mask of a head or channel multiplies the inputs of the linear layer that reads it. The mask of an expert adds its
logarithm to the logit of the router, so that an expert with mask 0 is never chosen.

Shapes: L layers, R sets of units per layer, N units per set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from effpass.trainers.pruning.expert_masks import mask_experts
from effpass.trainers.pruning.units import Units

__all__ = ["Masks"]

_MASK = "effpass_mask"


class Masks:
    """Masks of all units of a model.

    Args:
        model: model on its final device, with its adapters attached.
        units: units of the model, by family.

    Attributes:
        units: units of the model, by family.
        soft: learned masks, float32 `[L, R, N]`, by family. Their `grad` accumulates the gradients of backward passes.
        hard: masks of 0 and 1, of the same shape, by family.
        softness: softness τ.
    """

    def __init__(self, model: nn.Module, units: Mapping[str, Units]) -> None:
        self.model = model
        self.units = dict(units)
        device = next(model.parameters()).device
        self.soft = {f: nn.Parameter(torch.ones(u.shape, device=device)) for f, u in self.units.items()}
        self.hard = {f: torch.ones(u.shape, device=device) for f, u in self.units.items()}
        self.softness = 1.0

    def effective(self, family: str) -> Tensor:
        """Return the effective masks `[L, R, N]` of a family, with the straight-through gradient."""
        soft = self.soft[family]
        value = self.softness * soft.detach() + (1 - self.softness) * self.hard[family]
        return soft + (value - soft).detach()

    def refresh(self) -> None:
        """Compute the effective masks for the next forward and backward pass."""
        inputs: dict[str, Tensor] = {}
        for family, units in self.units.items():
            for reader, values in zip(units.readers.values(), self.effective(family).unbind(), strict=True):
                if units.width:
                    spread = units.expanded(values)
                    inputs[reader] = inputs[reader] * spread if reader in inputs else spread
                else:
                    setattr(self.model.get_submodule(reader), f"{_MASK}_{family}", values)
        for reader, mask in inputs.items():
            setattr(self.model.get_submodule(reader), _MASK, mask)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Context manager under which the model computes with the effective masks."""
        with ExitStack() as undo:
            undo.callback(self._forget)
            self.refresh()
            for units in self.units.values():
                for reader in units.readers.values():
                    module: Any = self.model.get_submodule(reader)
                    if not units.width:
                        undo.callback(mask_experts(self.model, reader, units.family, f"{_MASK}_{units.family}"))
                    elif units.family != "query_heads" or "kv_groups" not in self.units:  # else one hook has both
                        undo.callback(module.register_forward_pre_hook(_multiply).remove)
            yield

    def _forget(self) -> None:
        for units in self.units.values():
            for reader in units.readers.values():
                for name in (_MASK, f"{_MASK}_{units.family}"):
                    self.model.get_submodule(reader).__dict__.pop(name, None)


def _multiply(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *rest = args
    return (x * getattr(module, _MASK).to(x.dtype), *rest)
