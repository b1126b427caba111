"""Dropping whole layers of a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from effpass.core.errors import ModelError
from effpass.passes.weights.prunable_units import split_name

__all__ = ["drop_layers", "kept_names", "write_layers"]


def drop_layers(model: Any, kept: Sequence[int]) -> int:
    """Keep these layers alone, in place, in module tree and config; the number of dropped ones."""
    stack = _stack(model)
    layers = model.get_submodule(stack)
    owner, _, name = stack.rpartition(".")
    left = nn.ModuleList(layers[i] for i in kept)
    for new, layer in enumerate(left):
        for module in layer.modules():
            if "layer_idx" in module.__dict__:  # where it stands in a cache
                module.__dict__["layer_idx"] = new
    setattr(model.get_submodule(owner), name, left)
    write_layers(model.config, kept)
    return len(layers) - len(kept)


def kept_names(model: nn.Module, kept: Sequence[int]) -> dict[str, str]:
    """The name that each parameter has once layers are dropped, by the name that it has now."""
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
    """Set the number of layers in a transformers config, and what it says of each."""
    config = config.get_text_config()
    count = config.num_hidden_layers
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == count and name != "mlp_only_layers":  # `layer_types` and its like
            setattr(config, name, [value[i] for i in kept])
    dense = getattr(config, "first_k_dense_replace", None)
    if dense is not None:
        config.first_k_dense_replace = sum(i < dense for i in kept)
    if getattr(config, "mlp_only_layers", None):
        config.mlp_only_layers = [new for new, old in enumerate(kept) if old in config.mlp_only_layers]
    config.num_hidden_layers = len(kept)


def _stack(model: nn.Module) -> str:
    """Where the layers are, ``"model.layers"``."""
    for name, _ in model.named_parameters(remove_duplicate=False):
        parts = split_name(name)
        if parts is not None:
            return name.removesuffix(f".{parts[0]}.{name.partition(f'.{parts[0]}.')[2]}")
    raise ModelError(f"{type(model).__name__} has no stack of layers under a name that is known here")
