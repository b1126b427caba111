"""A model without some of its layers, as a draft for itself (https://arxiv.org/abs/2309.08168)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from effpass.core.errors import EffpassError
from effpass.runtime.speculative.session import decoder_layers

__all__ = ["skip_layers"]


def skip_layers(model: Any, keep: Sequence[int]) -> Any:
    """`model` with some of its decoder layers alone; the weights are shared.

    Args:
        model: a transformers causal LM.
        keep: numbers of the layers that stay, ascending.

    Raises:
        ModelError: the model's layers are not where models have them.
        EffpassError: `keep` is empty, not ascending, or names a layer that is not there.
    """
    count = len(decoder_layers(model))
    if not keep or list(keep) != sorted(set(keep)) or not 0 <= keep[0] <= keep[-1] < count:
        raise EffpassError(
            f"layers {list(keep)} can't be kept of a model with {count}",
            hint=f"name layers from 0 to {count - 1}, ascending",
        )
    # The engine and what it put on the model are the model's own.
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
