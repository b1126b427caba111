"""Keys and values stored in few bits, scaled for each token and head.

    int8    q = round(x / s)                s = max |x| / 127
    fp8     q = x / s in float8 e4m3        s = max |x| / 448
    int4    q = round((x - m) / s)          m = min x,  s = (max x - m) / 15;  two numbers a byte

s and m are bfloat16, and the rounding uses them as they are stored. All of a layer's slots are expanded when it
attends: the cache is small, and reading it is not faster.
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
    """Stores keys and values by :meth:`quantize`, each as numbers `[B, G, S, ...]` and scales `[B, G, S, 1 or 2]`."""

    @abstractmethod
    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers and scales of `x` `[B, G, T, features]`."""

    @abstractmethod
    def expand(self, numbers: Tensor, scales: Tensor) -> Tensor:
        """The reverse, up to rounding: float32 `[B, G, T, features]`."""

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
    """Symmetric, 8 bits."""

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = _scale(x.float().abs().amax(-1, keepdim=True) / 127)
        return (x / scale.float()).round().clamp(-127, 127).to(torch.int8), scale

    def expand(self, numbers: Tensor, scales: Tensor) -> Tensor:
        return numbers * scales.float()

    @staticmethod
    def bytes_of(features: int, element_size: int) -> float:
        return features + 2


class Fp8Layer(QuantizedLayer):
    """float8 e4m3, kept as bytes, which all operators know how to move."""

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
    """Asymmetric, 4 bits; the size of a head is even."""

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
    """As bfloat16, and never 0."""
    return x.clamp(min=1e-30).to(torch.bfloat16)


DTYPES: dict[str, type[EvictingLayer]] = {
    "auto": EvictingLayer,
    "int8": Int8Layer,
    "fp8": Fp8Layer,
    "int4": Int4Layer,
}


def layer_class(kv_cache_dtype: str) -> type[EvictingLayer]:
    """The layer that stores keys and values so; ``"auto"`` is the model's own dtype."""
    return DTYPES[kv_cache_dtype]
