"""Lookup of the attention modules in a transformers decoder, which linear attention replaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from effpass.core.errors import ModelError

__all__ = ["attention_layers"]

# Names of the output projection of attention in transformers' model families.
_OUTPUTS = ("o_proj", "c_proj", "out_proj", "dense")
# Types of layers, as configs name them, that have a recurrent state in place of attention or beside it.
_RECURRENT = ("linear_attention", "hybrid", "hybrid_sliding")


def attention_layers(model: Any, layers: Sequence[int] | None = None) -> dict[int, tuple[nn.Module, str]]:
    """Return the parent module of each decoder layer's attention and its attribute name there, by layer index.

    Args:
        model: a transformers causal LM.
        layers: indices of the layers to return; None for all.

    Raises:
        ModelError: if one of these layers has no attention module of a known form, or one that shares keys and values
            with other layers, or if `layers` is not a valid list of layers.
    """
    found: dict[int, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        parent, _, name = path.rpartition(".")
        if type(index) is int and "attn" in name and any(hasattr(module, output) for output in _OUTPUTS):
            found.setdefault(index, (model.get_submodule(parent), name))
    count, name = model.config.num_hidden_layers, type(model).__name__
    wanted = range(count) if layers is None else layers
    for index in wanted:
        if not 0 <= index < count:
            raise ModelError(f"{name} has no layer {index}", hint=f"its layers are 0 to {count - 1}")
    if not wanted or len(set(wanted)) != len(wanted):
        raise ModelError(f"layers: got {list(wanted)}", hint="give each layer once, and one at least")
    for index in sorted(wanted):
        if index not in found:
            raise ModelError(
                f"{name} has {count} layers, and attention is known in {len(found)}: not in layer {index}",
                hint="linear attention takes the place of attention in decoders like Llama, Qwen3, Gemma or GPT-2",
            )
        if reason := _unfit(model.config, index, getattr(*found[index])):
            raise ModelError(f"layer {index} of {name} {reason}", hint="choose other layers")
    return {index: found[index] for index in sorted(wanted)}


def _unfit(config: Any, index: int, module: nn.Module) -> str | None:
    """Return why linear attention can't take the place of the attention `module` of a layer; None if it can."""
    types = getattr(config, "layer_types", None) or []
    if index < len(types) and types[index] in _RECURRENT:
        return f"is of type {types[index]}, with a recurrent state of its own"
    if getattr(module, "is_kv_shared_layer", False):
        return "attends to the keys and values of another layer"
    if getattr(module, "store_full_length_kv", False):
        return "computes keys and values that other layers attend to"
    return None
