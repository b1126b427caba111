"""Shapes of the cache that a decode graph takes and returns, one layer after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effpass.core.cache_name import cache_name
from effpass.core.errors import ExportError
from effpass.lowering.targets.device import model_device

__all__ = ["CacheLayer", "cache_layers", "state_classes"]


@dataclass(frozen=True)
class CacheLayer:
    """Shape of the cache of one layer.

    An attention layer caches keys `[B, G, P, K]` and values `[B, G, P, V]` of P positions. A linear-attention layer
    caches the last inputs of its convolution `[B, conv_tokens, conv_channels]` and a state `[B, G, K, V]`, whose dtype
    is float32 or wider.

    Attributes:
        heads: number of heads G.
        key_size: number of elements K of a key.
        value_size: number of elements V of a value.
        conv_channels: channels of the convolution of a linear-attention layer; 0 for an attention layer.
        conv_tokens: cached inputs of the convolution, in tokens; 0 for an attention layer.
    """

    heads: int
    key_size: int
    value_size: int
    conv_channels: int = 0
    conv_tokens: int = 0

    @property
    def grows(self) -> bool:
        """Whether the cache has an entry per position, that is, whether the layer is an attention layer."""
        return self.conv_channels == 0

    @property
    def parts(self) -> tuple[str, str]:
        """Names of the two cache tensors."""
        return ("key", "value") if self.grows else ("conv", "state")

    def shapes(self, batch: int, past: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of the two cache tensors."""
        if self.grows:
            return (batch, self.heads, past, self.key_size), (batch, self.heads, past, self.value_size)
        return (batch, self.conv_tokens, self.conv_channels), (batch, self.heads, self.key_size, self.value_size)

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """Return the dtypes of the two cache tensors in a cache of `dtype`."""
        return dtype, dtype if self.grows else torch.promote_types(dtype, torch.float32)

    def zeros(self, batch: int, past: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Return the two cache tensors, filled with zeros; with `past` of 0, the cache before the first token."""
        specs = zip(self.shapes(batch, past), self.dtypes(dtype), strict=True)
        return [torch.zeros(shape, dtype=kind, device=device) for shape, kind in specs]

    def to_json(self) -> list[int]:
        """Return the arguments of the constructor."""
        sizes = [self.heads, self.key_size, self.value_size]
        return sizes if self.grows else [*sizes, self.conv_channels, self.conv_tokens]


def cache_layers(model: Any) -> tuple[CacheLayer, ...]:
    """Return the shapes of the model's cache, found by running the model on two tokens.

    Raises:
        ExportError: if a layer caches neither keys and values nor the state of effpass's linear attention.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    cache: Any = DynamicCache(config=model.config)
    with torch.no_grad():
        ids = torch.zeros(1, 2, dtype=torch.long, device=model_device(model))
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **{cache_name(): cache})
    layers = []
    states = state_classes(model)
    for index, layer in enumerate(cache.layers):
        if index in states:
            (_, heads, key_size, value_size), (_, tokens, channels) = layer.state.shape, layer.conv.shape
            layers.append(CacheLayer(heads, key_size, value_size, channels, tokens))
            continue
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
            raise ExportError(
                f"layer {index} of {type(model).__name__} caches a {type(layer).__name__}; "
                "the decode graph holds keys and values only",
                hint="models with recurrent or convolution layers can be compiled, not exported",
            )
        layers.append(CacheLayer(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]))
    if not layers:
        raise ExportError(f"{type(model).__name__} used no cache", hint=f"it must take {cache_name()} and use_cache")
    return tuple(layers)


def state_classes(model: Any) -> dict[int, type]:
    """Return the cache classes of linear-attention layers by layer index, from the attribute `cache_layer` of modules.

    An instance holds `conv`, `state`, and the number of tokens `seen`.
    """
    return {module.layer_idx: module.cache_layer for module in model.modules() if hasattr(module, "cache_layer")}
