"""Estimate of the device memory that a training run needs; reported and checked before the run starts.

The estimators of the individual trainers use this module. Activations are counted by running the model on fake tensors,
which have shapes but no data, and adding up the storages that autograd saves for the backward pass, each storage once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface

from effpass.core.errors import EffpassError
from effpass.lowering.targets.host_memory import available_memory

__all__ = ["SHAPES", "Estimate", "available", "check_memory", "kept_bytes", "use_causal_attention"]

_FLOAT = 4
_CAUSAL = "effpass_causal"
# Device of the fake tensors. The CPU stands for all devices, since fused attention saves the same tensors on each.
SHAPES = torch.device("cpu")


@dataclass(frozen=True)
class Estimate:
    """Estimated memory of a run on one device, in bytes.

    Attributes:
        parameters: number of parameters of the model.
        state: size of weights, gradients and optimizer state.
        activations: size of the tensors saved for the backward pass, in the part of the run that saves most; None if
            the model can't be run on fake tensors.
        where: name of that part, such as ``"stages[1]"``; empty if the run has a single part.
        available: free memory of the device before the run; None if unknown.
    """

    parameters: int
    state: int
    activations: int | None
    where: str
    available: int | None

    @property
    def total(self) -> int:
        """Sum of state and activations, where unknown activations count as 0."""
        return self.state + (self.activations or 0)

    def __str__(self) -> str:
        found = "unknown" if self.available is None else f"{self.available / 1e9:.2f} GB"
        kept = "activations, which can't be counted for this model"
        if self.activations is not None:
            kept = f"{self.activations / 1e9:.2f} GB of activations" + (f" in {self.where}" if self.where else "")
        return (
            f"{self.parameters / 1e6:.2f} M parameters; {self.total / 1e9:.2f} GB on each device:"
            f" {self.state / 1e9:.2f} GB of weights, gradients and optimizer state, and {kept}; available: {found}"
        )


def check_memory(found: Estimate, hint: str) -> None:
    """Raise an :class:`EffpassError` with this hint if the run needs more memory than is available."""
    if found.available is not None and found.total > found.available:
        raise EffpassError(f"the run does not fit: {found}", hint=hint)


def kept_bytes(
    model: nn.Module, forward: Callable[[Callable[[Tensor], Tensor]], tuple[Tensor, Tensor]], *, bfloat16: bool
) -> int:
    """Count the bytes that autograd saves in a forward pass, and those of the gradients that start the backward pass.

    Args:
        model: model on fake tensors; its parameters are not counted.
        forward: function that runs the model and returns logits `[B, T, vocabulary]` and token ids `[B, T]`. It is
            called with a function; tensors passed to that function are counted as saved.
        bfloat16: whether the model runs under autocast to bfloat16.
    """
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    storages: dict[int, tuple[object, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = (storage, storage.nbytes())  # the reference keeps the address from being reused
        return tensor

    autocast = torch.autocast(SHAPES.type, torch.bfloat16, enabled=bfloat16)
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits, ids = forward(keep)
        logits = logits.float()
        cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    gradients = 2 * _FLOAT * logits.numel()
    return sum(size for key, (_, size) in storages.items() if key not in own) + gradients


def use_causal_attention(model: Any, *, text_only: bool = False) -> None:
    """Make the attention of `model` causal without a mask.

    On fake tensors transformers can't detect that a mask is causal, and would build one of size T². Models that do not
    attend through transformers' AttentionInterface are left as they are.

    Args:
        model: transformers model.
        text_only: whether to change only the language model of a multimodal model.
    """
    if not model._supports_attention_backend:  # its attention needs the mask
        return
    AttentionInterface.register(_CAUSAL, _causal_attention)
    model.set_attn_implementation({"text_config": _CAUSAL} if text_only else _CAUSAL)


def available(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def _causal_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any) -> Any:
    """Causal attention as transformers' attention layers call it; it is registered without a mask builder."""
    is_grouped = query.shape[1] != key.shape[1]
    scale = kwargs.get("scaling")
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=is_grouped)
    return out.transpose(1, 2).contiguous(), None
