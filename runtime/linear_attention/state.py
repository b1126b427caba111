"""Cache layers of linear attention: a state and the last inputs of the short convolution, of constant size.

:class:`StateLayer` is a layer of transformers' caches, and :class:`StateBuffers` is one of the decode engine's cache.
Neither can remove some of its tokens, since a state can't be reverted.

Shapes: B batch, HV value heads, K key size, V value size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from effpass.core.errors import ModelError
from effpass.runtime.cache import BufferedLayer, DecodeCache, Slots, cannot_crop
from effpass.runtime.linear_attention.settings import GatedDeltaSettings

__all__ = ["StateBuffers", "StateLayer", "state_layer"]


def _is_no_attention(*_: Any, **__: Any) -> Any:
    raise ModelError("a layer of linear attention caches no keys and values")


class StateLayer(CacheLayerMixin):
    """A linear-attention layer of a transformers cache.

    Attributes:
        conv: [B, conv_kernel_size - 1, channels], last inputs of the convolution; None before the first token.
        state: float32 [B, HV, K, V], state of the recurrence; None before the first token.
        seen: number of tokens that the state contains.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False
    update = lazy_initialization = _is_no_attention  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.conv: Tensor | None = None
        self.state: Tensor | None = None
        self.seen = 0

    def read(self, rows: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Return `conv` and `state`; both arguments are ignored."""
        return self.conv, self.state

    def write(self, conv: Tensor, state: Tensor | None, tokens: int) -> None:
        """Store the cache contents after `tokens` more tokens."""
        assert state is not None
        self.conv, self.state = conv, state
        self.seen += tokens
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        removed = abs(tokens_to_remove)
        if removed >= self.seen:
            self.reset()
        elif removed:
            raise cannot_crop(removed)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices])

    def offload(self) -> None:
        """Do nothing: the layer is small and stays on the device."""

    def prefetch(self) -> None:
        """Do nothing; see :meth:`offload`."""

    def _each(self, change: Any) -> None:
        if self.conv is not None and self.state is not None:
            self.conv, self.state = change(self.conv), change(self.state)


class StateBuffers(BufferedLayer):
    """A linear-attention layer of the decode engine's cache, in buffers of fixed address.

    Args:
        slots: slots of the layers that cache keys, which give batch size and device; the state itself has no slots.
        settings: settings of the layer.

    Attributes:
        conv: [B, conv_kernel_size - 1, channels], last inputs of the convolution; zeros before the first token.
        state: float32 [B, HV, K, V], state of the recurrence; zeros before the first token.
    """

    is_croppable = False
    keeps_places = False
    keeps_keys = False
    update = lazy_initialization = _is_no_attention  # type: ignore[assignment]
    conv: Tensor
    state: Tensor

    def __init__(self, slots: Slots, settings: GatedDeltaSettings) -> None:
        super().__init__(slots, window=0)
        self.settings = settings

    def read(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return views of `conv` and `state` for the first `rows` sequences; the first call allocates the buffers.

        Args:
            rows: number of sequences.
            dtype: dtype of `conv`.
        """
        if not self.is_initialized:
            sizes, (batch, _), device = self.settings, self.slots.positions.shape, self.slots.positions.device
            self.conv = torch.zeros(batch, sizes.conv_kernel_size - 1, sizes.channels, dtype=dtype, device=device)
            self.state = torch.zeros(
                batch,
                sizes.num_value_heads,
                sizes.key_head_dim,
                sizes.value_head_dim,
                dtype=_state_type(dtype),
                device=device,
            )
            self.dtype, self.device, self.is_initialized = dtype, device, True
        return self.conv[:rows], self.state[:rows]

    def write(self, conv: Tensor, state: Tensor | None, tokens: int) -> None:
        """Copy the contents after `tokens` more tokens into the buffers; `state` is None if it was updated in place."""
        self.conv[: len(conv)].copy_(conv)
        if state is not None:
            self.state[: len(state)].copy_(state)

    def forget(self) -> None:
        if self.is_initialized:
            self.conv.zero_()
            self.state.zero_()

    def own_state(self) -> list[Tensor]:
        return [self.conv, self.state] if self.is_initialized else []


def _state_type(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def state_layer(cache: Cache, index: int) -> StateLayer | StateBuffers:
    """Return the cache layer of the linear-attention layer `index`; in a transformers cache, create it on first use.

    Raises:
        ModelError: if the cache layer already holds keys and values, or the cache is of an unsupported kind.
    """
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[index]
    if isinstance(layer, (StateLayer, StateBuffers)):
        return layer
    if isinstance(layer, StaticLayer):
        raise ModelError(
            f"layer {index} is linear attention, whose state has no place in a {type(cache).__name__}",
            hint="use the default cache, a DynamicCache; or effpass.prepare, whose buffers have a fixed size too",
        )
    if isinstance(cache, DecodeCache) or (layer.is_initialized and layer.get_seq_length() > 0):
        raise ModelError(
            f"layer {index} is linear attention, and its cache a {type(layer).__name__} in a {type(cache).__name__}",
            hint="passes that bring a cache of their own work on models whose layers all keep keys and values",
        )
    cache.layers[index] = StateLayer()  # type: ignore[assignment]
    return cache.layers[index]  # type: ignore[return-value]
