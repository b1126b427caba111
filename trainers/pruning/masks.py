"""Masks on the units of a model: one number for each, which what the unit says is multiplied by.

    effective = τ · soft + (1 − τ) · hard

`soft` is learned, in [0, 1]. `hard` is 1 for the units that are to stay and 0 for the others. τ is 1 while masks are
learned, and falls to 0 while the model closes; at 0 the model computes what the cut one will. Gradients pass straight
through to `soft`, also where the effective mask is 0.

A head's or a channel's mask multiplies the inputs of the layer that reads it; an expert's shifts the router's logit by
its logarithm, so that at 0 the expert is never chosen.
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
    """
    Attributes:
        units: by family.
        soft: float32 `[L, R, N]`, by family; the gradients of the last steps are its `grad`.
        hard: the same shape, 0 or 1.
        softness: τ.

    Args:
        model: on its device, its adapters in place.
        units: of it.
    """

    def __init__(self, model: nn.Module, units: Mapping[str, Units]) -> None:
        self.model = model
        self.units = dict(units)
        device = next(model.parameters()).device
        self.soft = {f: nn.Parameter(torch.ones(u.shape, device=device)) for f, u in self.units.items()}
        self.hard = {f: torch.ones(u.shape, device=device) for f, u in self.units.items()}
        self.softness = 1.0

    def effective(self, family: str) -> Tensor:
        """`[L, R, N]`, with the straight-through gradient."""
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
        """Within, the model computes with the effective masks."""
        with ExitStack() as undo:
            undo.callback(self._forget)
            self.refresh()
            for units in self.units.values():
                for reader in units.readers.values():
                    module: Any = self.model.get_submodule(reader)
                    if not units.width:
                        undo.callback(mask_experts(self.model, reader, units.family, f"{_MASK}_{units.family}"))
                    elif units.family != "query_heads" or "kv_groups" not in self.units:  # else one product has both
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
