"""Masks inside a mixture of experts."""

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

# Logits of experts that are never chosen, and the least mask above 0: e^-30 is lost in a sum with 1.
_NEVER, _LEAST = -1e4, 1e-13
_BIAS = "e_score_correction_bias"


def mask_experts(model: nn.Module, reader: str, family: str, attribute: str) -> Callable[[], None]:
    """Let a stack of experts compute with the mask `[R, N]` that stands in its `attribute`.

    Returns:
        What takes the mask away.

    Raises:
        ModelError: a router that chooses in another way.
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
    """`down_proj` `[E, D, F]`, its inputs multiplied by the masks `[E, F]`."""

    def __init__(self, experts: Any, attribute: str) -> None:
        super().__init__()
        self._mask = lambda: getattr(experts, attribute)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self._mask().to(weight.dtype)[:, None]


class _Router:
    """A router's forward with log masks on its logits.

    What comes after the logits is the router's own code, called on the shifted logits with an identity for its weight.
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
