"""What a run takes of the device's memory, said before it starts.

Activations are counted by running the model on fake tensors, which have shapes and no data: the bytes of every tensor
that autograd would keep for the backward pass, each storage once.
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
# Where tensors without data pretend to be. Fused attention keeps the same for the backward pass on every device.
SHAPES = torch.device("cpu")


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device.

    Attributes:
        parameters: how many.
        state: weights, gradients and the optimiser's state.
        activations: what is kept for the backward pass, where most is kept; None where the model can't be run on
            tensors without data.
        where: what keeps most, ``"stages[1]"``; empty where there is one thing alone.
        available: on the device before the run; None where it does not say.
    """

    parameters: int
    state: int
    activations: int | None
    where: str
    available: int | None

    @property
    def total(self) -> int:
        return self.state + (self.activations or 0)

    def __str__(self) -> str:
        found = "unknown" if self.available is None else f"{self.available / 1e9:.2f} GB"
        kept = "activations, which can't be counted for this model"
        if self.activations is not None:
            kept = f"{self.activations / 1e9:.2f} GB of activations" + (f" in {self.where}" if self.where else "")
        return (
            f"{self.parameters / 1e6:.2f} M parameters; {self.total / 1e9:.2f} GB on each device:"
            f" {self.state / 1e9:.2f} GB of weights, gradients and optimiser state, and {kept}; available: {found}"
        )


def check_memory(found: Estimate, hint: str) -> None:
    """Raise an :class:`EffpassError` when the run would not fit."""
    if found.available is not None and found.total > found.available:
        raise EffpassError(f"the run does not fit: {found}", hint=hint)


def kept_bytes(
    model: nn.Module, forward: Callable[[Callable[[Tensor], Tensor]], tuple[Tensor, Tensor]], *, bfloat16: bool
) -> int:
    """Bytes that autograd keeps of a forward pass, and those that the backward pass begins with.

    Args:
        model: on fake tensors; its parameters are not counted.
        forward: runs it; gives logits `[B, T, vocabulary]` and tokens `[B, T]`. What it passes to the function that it
            is given counts as kept.
        bfloat16: under autocast.
    """
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    storages: dict[int, tuple[object, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = (storage, storage.nbytes())  # held, so that no other takes its address
        return tensor

    autocast = torch.autocast(SHAPES.type, torch.bfloat16, enabled=bfloat16)
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits, ids = forward(keep)
        logits = logits.float()
        cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    gradients = 2 * _FLOAT * logits.numel()
    return sum(size for key, (_, size) in storages.items() if key not in own) + gradients


def use_causal_attention(model: Any, *, text_only: bool = False) -> None:
    """Let `model` attend without a mask. Told by fake tensors, transformers can't see that a mask is causal, and would
    build one as large as T²."""
    AttentionInterface.register(_CAUSAL, _causal_attention)
    model.set_attn_implementation({"text_config": _CAUSAL} if text_only else _CAUSAL)


def available(device: torch.device) -> int | None:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def _causal_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any) -> Any:
    """What a model's attention layer calls; registered without a builder of masks."""
    is_grouped = query.shape[1] != key.shape[1]
    scale = kwargs.get("scaling")
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=is_grouped)
    return out.transpose(1, 2).contiguous(), None
