"""Layers of a cache with a budget that quantize keys and values, with a scale for each token and KV head.

    int8    q = round(x / s)                s = max |x| / 127
    fp8     q = x / s in float8 e4m3        s = max |x| / 448
    int4    q = round((x - m) / s)          m = min x,  s = (max x - m) / 15;  two numbers per byte

x are the numbers of one token in one KV head. s and m are bfloat16, and quantization uses them as they are stored. All
slots that a call reads are dequantized before the layer attends to them, so that the cache is small and reading it is
not faster. The option `kv_cache_dtype` selects the class through :func:`layer_class`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effpass.core.errors import ModelError
from effpass.runtime.prefix_kv.layer import EvictingLayer

__all__ = ["DTYPES", "QuantizedLayer", "layer_class"]

_LARGEST_FP8 = 448.0


class QuantizedLayer(EvictingLayer):
    """Base class of layers that store keys and values each as numbers `[B, G, S, ...]` and scales `[B, G, S, 1 or 2]`.

    The last dimension of the scales is 2 if a minimum is stored beside each scale.
    """

    @abstractmethod
    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize `x` `[B, G, T, features]` to numbers and scales."""

    @abstractmethod
    def expand(self, numbers: Tensor, scales: Tensor) -> Tensor:
        """Dequantize `numbers` with their `scales` to float32 `[B, G, T, features]`."""

    def storage(self) -> list[Tensor]:
        return self._stored

    def encode(self, keys: Tensor, values: Tensor) -> Sequence[Tensor]:
        return [*self.quantize(keys), *self.quantize(values)]

    def decode(self, stored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        keys, key_scales, values, value_scales = stored
        return self.expand(keys, key_scales).to(self.dtype), self.expand(values, value_scales).to(self.dtype)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, capacity = self.slots.positions.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        like = self.encode(key_states[:1, :, :1], value_states[:1, :, :1])
        self._stored = [x.new_zeros(batch, x.shape[1], capacity, x.shape[3]) for x in like]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows, tokens, reads = key_states.shape[0], key_states.shape[2], self.slots.reads
        stored = self._stored
        if rows < stored[0].shape[0]:
            stored = [x[:rows] for x in stored]
        new = self.encode(key_states, value_states)
        if self.slots.is_replayed:
            for at in (0, 1):
                torch.ops.effpass.cache_write(stored[at], stored[at + 2], new[at], new[at + 2], self.slots.start)
        else:
            for to, x in zip(stored, new, strict=True):
                to[:, :, reads - tokens : reads] = x
        if reads < stored[0].shape[2]:
            stored = [x[:, :, :reads] for x in stored]
        return self.decode(stored)


class Int8Layer(QuantizedLayer):
    """Symmetric quantization to 8-bit integers."""

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = _scale(x.float().abs().amax(-1, keepdim=True) / 127)
        return (x / scale.float()).round().clamp(-127, 127).to(torch.int8), scale

    def expand(self, numbers: Tensor, scales: Tensor) -> Tensor:
        return numbers * scales.float()

    @staticmethod
    def bytes_of(features: int, element_size: int) -> float:
        return features + 2


class Fp8Layer(QuantizedLayer):
    """Quantization to float8 e4m3, stored as uint8, whose bytes all indexing operators can move."""

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = _scale(x.float().abs().amax(-1, keepdim=True) / _LARGEST_FP8)
        scaled = (x / scale.float()).clamp(-_LARGEST_FP8, _LARGEST_FP8)
        return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scale

    def expand(self, numbers: Tensor, scales: Tensor) -> Tensor:
        return numbers.view(torch.float8_e4m3fn).float() * scales.float()

    @staticmethod
    def bytes_of(features: int, element_size: int) -> float:
        return features + 2


class Int4Layer(QuantizedLayer):
    """Asymmetric quantization to 4-bit integers; the head size has to be even."""

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-1] % 2:
            raise ModelError(
                f"kv_cache_dtype: int4 stores two numbers a byte, and a head has {x.shape[-1]}", hint="use int8 or fp8"
            )
        wide = x.float()
        least = wide.amin(-1, keepdim=True).to(torch.bfloat16)
        scale = _scale((wide.amax(-1, keepdim=True) - least.float()) / 15)
        numbers = ((wide - least.float()) / scale.float()).round().clamp(0, 15).to(torch.uint8)
        return numbers[..., ::2] | (numbers[..., 1::2] << 4), torch.cat((scale, least), -1)

    def expand(self, numbers: Tensor, scales: Tensor) -> Tensor:
        pairs = torch.stack((numbers & 15, numbers >> 4), -1).flatten(-2)
        return pairs * scales[..., :1].float() + scales[..., 1:].float()

    @staticmethod
    def bytes_of(features: int, element_size: int) -> float:
        return features / 2 + 4


def _scale(x: Tensor) -> Tensor:
    """Convert scales to bfloat16, with a lower bound that keeps them above 0."""
    return x.clamp(min=1e-30).to(torch.bfloat16)


DTYPES: dict[str, type[EvictingLayer]] = {
    "auto": EvictingLayer,
    "int8": Int8Layer,
    "fp8": Fp8Layer,
    "int4": Int4Layer,
}


def layer_class(kv_cache_dtype: str) -> type[EvictingLayer]:
    """Return the layer class for a `kv_cache_dtype`; ``"auto"`` stores keys and values in the model's dtype."""
    return DTYPES[kv_cache_dtype]
