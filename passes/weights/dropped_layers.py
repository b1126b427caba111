"""Removal of whole layers from a decoder, in the module tree and in the config; used by `structured_pruning`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from effpass.core.errors import ModelError
from effpass.passes.weights.prunable_units import split_name

__all__ = ["drop_layers", "kept_names", "write_layers"]


def drop_layers(model: Any, kept: Sequence[int]) -> int:
    """Remove all layers except `kept` from `model` and its config, in place; return the number of removed layers."""
    stack = _stack(model)
    layers = model.get_submodule(stack)
    owner, _, name = stack.rpartition(".")
    left = nn.ModuleList(layers[i] for i in kept)
    for new, layer in enumerate(left):
        for module in layer.modules():
            if "layer_idx" in module.__dict__:  # index of the layer in a KV cache
                module.__dict__["layer_idx"] = new
    setattr(model.get_submodule(owner), name, left)
    write_layers(model.config, kept)
    return len(layers) - len(kept)


def kept_names(model: nn.Module, kept: Sequence[int]) -> dict[str, str]:
    """Map the name of each remaining parameter to the name that it has once only the layers `kept` are left."""
    stack, new = f"{_stack(model)}.", {old: i for i, old in enumerate(kept)}
    found = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        parts = split_name(name)
        if parts is None:
            found[name] = name
        elif parts[0] in new:
            found[name] = f"{stack}{new[parts[0]]}.{name.removeprefix(stack).partition('.')[2]}"
    return found


def write_layers(config: Any, kept: Sequence[int]) -> None:
    """Set the number of layers in a transformers config, and restrict its per-layer settings to the layers `kept`."""
    config = config.get_text_config()
    count = config.num_hidden_layers
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == count and name != "mlp_only_layers":  # such as `layer_types`
            setattr(config, name, [value[i] for i in kept])
    dense = getattr(config, "first_k_dense_replace", None)
    if dense is not None:
        config.first_k_dense_replace = sum(i < dense for i in kept)
    if getattr(config, "mlp_only_layers", None):
        config.mlp_only_layers = [new for new, old in enumerate(kept) if old in config.mlp_only_layers]
    config.num_hidden_layers = len(kept)


def _stack(model: nn.Module) -> str:
    """Return the name of the module that holds the decoder layers, such as ``"model.layers"``."""
    for name, _ in model.named_parameters(remove_duplicate=False):
        parts = split_name(name)
        if parts is not None:
            return name.removesuffix(f".{parts[0]}.{name.partition(f'.{parts[0]}.')[2]}")
    raise ModelError(f"{type(model).__name__} has no stack of layers under a name that is known here")
