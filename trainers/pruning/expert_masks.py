"""Masks on the units of a mixture of experts.

:class:`~effpass.trainers.pruning.masks.Masks` uses them for the families `experts` and `expert_channels`. The logarithm
of an expert's mask is added to its logit in the router, and the masks of channels scale the inputs of `down_proj`.

Shapes: E experts, D hidden size, F intermediate size of an expert, R sets of N units.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from effpass.core.errors import ModelError

__all__ = ["mask_experts"]

# Offset of the logits of experts that are never chosen, and lower bound of masks above 0. The latter is e^-30, which
# vanishes when it is added to 1.
_NEVER, _LEAST = -1e4, 1e-13
_BIAS = "e_score_correction_bias"


def mask_experts(model: nn.Module, reader: str, family: str, attribute: str) -> Callable[[], None]:
    """Make stacked experts compute with the mask `[R, N]` stored in one of their attributes.

    Args:
        model: model with the experts.
        reader: name of the module that holds the stacked experts.
        family: family of units that the mask belongs to.
        attribute: name of the attribute of this module that holds the mask.

    Returns:
        A function that removes the mask.

    Raises:
        ModelError: the router is of an unsupported kind.
    """
    experts: Any = model.get_submodule(reader)
    if family == "expert_channels":
        parametrize.register_parametrization(experts, "down_proj", _Scaled(experts, attribute))

        def restore() -> None:
            parametrize.remove_parametrizations(experts, "down_proj", leave_parametrized=False)

        return restore
    gate: Any = model.get_submodule(f"{reader.removesuffix('experts')}gate")
    original = gate.forward
    gate.forward = _Router(gate, experts, attribute)
    try:
        _check_router(gate, original, experts, attribute)
    except ModelError:
        del gate.forward
        raise

    def undo() -> None:
        del gate.forward

    return undo


class _Scaled(nn.Module):
    """Parametrization of `down_proj` `[E, D, F]` that multiplies its inputs by the masks `[E, F]`."""

    def __init__(self, experts: Any, attribute: str) -> None:
        super().__init__()
        self._mask = lambda: getattr(experts, attribute)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self._mask().to(weight.dtype)[:, None]


class _Router:
    """Forward pass of a router with the logarithm of the masks added to its logits.

    The computation after the logits is the original code of the router: it is called with the shifted logits as inputs
    and an identity matrix as its weight.
    """

    def __init__(self, gate: Any, experts: Any, attribute: str) -> None:
        self._logits, self._experts, self._attribute = gate.forward, experts, attribute
        self._gate = gate
        self._rest = copy.deepcopy(gate)
        count = gate.weight.shape[0]
        self._rest.weight = nn.Parameter(torch.eye(count, dtype=gate.weight.dtype, device=gate.weight.device), False)
        self._rest.hidden_dim = count

    def __call__(self, hidden_states: Tensor) -> Any:
        mask = getattr(self._experts, self._attribute).flatten()
        shift = torch.where(mask > 0, mask.clamp(min=_LEAST).log(), mask + _NEVER)
        logits = self._logits(hidden_states)[0]
        changed = {}
        if isinstance(getattr(self._gate, _BIAS, None), Tensor):
            changed[_BIAS] = getattr(self._gate, _BIAS) + shift.detach()
        return functional_call(self._rest, changed, ((logits + shift.to(logits.dtype)),))


@torch.no_grad()
def _check_router(gate: Any, original: Any, experts: Any, attribute: str) -> None:
    """Check that with all masks 1 the replaced forward pass of a router equals the original one."""
    width = gate.weight.shape[1]
    x = torch.linspace(-1, 1, 8 * width, device=gate.weight.device).view(8, width).sin().to(gate.weight.dtype)
    mask = getattr(experts, attribute)
    setattr(experts, attribute, torch.ones_like(mask))
    same = all(torch.equal(a, b) for a, b in zip(gate(x), original(x), strict=True))
    setattr(experts, attribute, mask)
    if not same:
        raise ModelError(
            f"{type(gate).__name__} chooses experts in a way that is not known here", hint="--units without experts"
        )
