"""The annealed activation of AFA-LoRA, attached to PEFT's LoRA layers as a variant.

PEFT lets a `LoraVariant` replace the forward pass and the merging of a LoRA layer. The class is private to PEFT ("prone
to change"), and this is the only module that depends on its methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.nn import functional

from effpass.core.errors import EffpassError

__all__ = ["ACTIVATIONS", "AfaVariant", "Anneal", "annealed"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
}


def annealed(z: Tensor, beta: Tensor | float, activation: str) -> Tensor:
    """Return σ_β(z) = z + β (σ(z) − z) in the dtype of z; at β = 0 the result is bitwise equal to z."""
    return z + beta * (ACTIVATIONS[activation](z) - z)


class Anneal(nn.Module):
    """Holder of β for all adapted layers of a model: a float32 tensor without dimensions, which is written in place.

    β is a tensor, so that compiled code does not depend on its value. The holder is a module, so that β follows the
    model to its device; its dtype does not change.

    Attributes:
        beta: β as a tensor.
        value: β as a Python float.
    """

    beta: Tensor

    def __init__(self, value: float, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("beta", torch.tensor(value, dtype=torch.float32, device=device), persistent=False)
        self.value = value

    @torch.no_grad()
    def set(self, value: float) -> None:
        self.value = value
        self.beta.fill_(value)

    def _apply(self, fn: Any, recurse: bool = True) -> Anneal:
        moved = fn(self.beta)
        if moved.device != self.beta.device:
            self.beta = torch.tensor(self.value, dtype=torch.float32, device=moved.device)
        return self


class AfaVariant(LoraVariant):
    """LoRA layer that applies the annealed activation to `A x` before B.

    Args:
        anneal: holder of β, shared by all layers.
        activation: name of the activation, a key of :data:`ACTIVATIONS`.
    """

    def __init__(self, anneal: Anneal, activation: str) -> None:
        self.anneal = anneal
        self.activation = activation

    @staticmethod
    def init(module: Any, adapter_name: str, **_: Any) -> None:
        """Do nothing: PEFT calls this for variants that are named in its config, and this one needs no preparation."""

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        z = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        h = annealed(z, self.anneal.beta, self.activation)
        up, scale = module.lora_B[active_adapter], module.scaling[active_adapter]
        if up.bias is None:  # scaling before B touches r values per token instead of d_out, and so do the gradients
            return result + up(h * scale)
        return result + up(h) * scale

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        self._check_linear()
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:  # type: ignore[override]
        self._check_linear()
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def _check_linear(self) -> None:
        if self.anneal.value:
            refuse_merge(self.anneal.value)


def refuse_merge(beta: float) -> NoReturn:
    """Raise the error for an adapter that is still non-linear and therefore can't be merged."""
    raise EffpassError(
        f"the adapter can't be merged: its activation is annealed to β = {beta:.3g} and not to 0, so that it is no"
        " product of two matrices",
        hint="train to the end of the anneal (AfaLora.step) and call finish()",
    )
