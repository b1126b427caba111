"""Lookup of the attention modules in a transformers decoder, which linear attention replaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from effpass.core.errors import ModelError

__all__ = ["attention_layers"]

# Names of the output projection of attention in transformers' model families.
_OUTPUTS = ("o_proj", "c_proj", "out_proj", "dense")


def attention_layers(model: Any, layers: Sequence[int] | None = None) -> dict[int, tuple[nn.Module, str]]:
    """Return the parent module of each decoder layer's attention and its attribute name there, by layer index.

    Args:
        model: a transformers causal LM.
        layers: indices of the layers to return; None for all.

    Raises:
        ModelError: if a layer has no attention module of a known form, or `layers` is not a valid list of layers.
    """
    found: dict[int, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        parent, _, name = path.rpartition(".")
        if type(index) is int and "attn" in name and any(hasattr(module, output) for output in _OUTPUTS):
            found.setdefault(index, (model.get_submodule(parent), name))
    count = model.config.num_hidden_layers
    if sorted(found) != list(range(count)):
        raise ModelError(
            f"{type(model).__name__} has {count} layers, and attention is known in {len(found)}",
            hint="linear attention takes the place of attention in decoders like Llama, Qwen3, Gemma or GPT-2",
        )
    if layers is None:
        return found
    for index in layers:
        if index not in found:
            raise ModelError(f"{type(model).__name__} has no layer {index}", hint=f"its layers are 0 to {count - 1}")
    if not layers or len(set(layers)) != len(layers):
        raise ModelError(f"layers: got {list(layers)}", hint="give each layer once, and one at least")
    return {index: found[index] for index in sorted(layers)}
