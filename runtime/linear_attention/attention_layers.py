"""Where a transformers decoder has its attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from effpass.core.errors import ModelError

__all__ = ["attention_layers"]

# What the output of attention goes through, in the families of transformers.
_OUTPUTS = ("o_proj", "c_proj", "out_proj", "dense")


def attention_layers(model: Any, layers: Sequence[int] | None = None) -> dict[int, tuple[nn.Module, str]]:
    """The attention of each decoder layer: the module that holds it, and its name there.

    Args:
        model: a transformers causal LM.
        layers: the numbers asked for; all by default.

    Raises:
        ModelError: the model has no attention that is known here, or no such layers.
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
