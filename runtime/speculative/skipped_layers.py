"""Self-speculative decoding: a model without some of its layers as its own draft (https://arxiv.org/abs/2309.08168)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from effpass.core.errors import EffpassError
from effpass.runtime.speculative.session import decoder_layers

__all__ = ["skip_layers"]


def skip_layers(model: Any, keep: Sequence[int]) -> Any:
    """Return a copy of `model` with some of its decoder layers only, which shares its weights.

    Args:
        model: a transformers causal LM.
        keep: indices of the layers to keep, ascending.

    Raises:
        ModelError: if the list of the model's decoder layers is not found.
        EffpassError: if `keep` is empty or not ascending, or an index is out of range.
    """
    count = len(decoder_layers(model))
    if not keep or list(keep) != sorted(set(keep)) or not 0 <= keep[0] <= keep[-1] < count:
        raise EffpassError(
            f"layers {list(keep)} can't be kept of a model with {count}",
            hint=f"name layers from 0 to {count - 1}, ascending",
        )
    # The decode engine and the `generate` that it installed belong to the model, and are not copied.
    held = {name: model.__dict__.pop(name) for name in ("effpass_engine", "generate") if name in model.__dict__}
    try:
        small = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    finally:
        model.__dict__.update(held)
    layers, text = decoder_layers(small), small.config.get_text_config(decoder=True)
    stay = [layers[i] for i in keep]
    del layers[:]
    layers.extend(torch.nn.ModuleList(stay))
    for number, layer in enumerate(stay):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = number
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        text.layer_types = [kinds[i] for i in keep]
    text.num_hidden_layers = len(keep)
    return small
