"""The KV cache of the decode engine: buffers of fixed size, with the token position stored for every slot.

A token has a *position*, its index in its own sequence, and a *slot*, its index in the buffers. The two differ if a
sequence is padded on the left, or if a pass evicts keys. Which slots a query may read follows from positions alone:

    slot s is visible to query t  ⇔  0 ≤ position[s] ≤ position[t]  and  position[t] − position[s] < window

Padding, eviction and layers of different lengths therefore need no attention mask, and none is ever built.

Shapes: B batch size of the buffers, S slots, G KV heads, K key size, V value size, T new tokens. A call uses the first
`rows` of the B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

import effpass.lowering.ops.append_positions
import effpass.lowering.ops.cached_attention  # noqa: F401  (registers the operators)
from effpass.core.errors import EffpassError, ModelError
from effpass.lowering.ops.block_pool import BlockPool

__all__ = [
    "BufferedLayer",
    "DecodeCache",
    "Reader",
    "Slots",
    "cannot_crop",
    "full_layers",
    "layer_windows",
    "new_layers",
]


class Slots:
    """Token positions of the cache slots, shared by layers that hold the same tokens.

    Attributes:
        positions: int32 `[B, S]`, position of the token in each slot; -1 for an empty slot or padding.
        start: int32 `[1]` on the device, slot of the current call's first token.
        filled: int32 `[1]` on the device, number of slots in use, including those of the current call.
        length: host copy of `filled` (*physical length*).
        seen: number of tokens entered, including evicted ones (*logical length*), on the host.
        is_replayed: whether the call is being recorded in a CUDA graph, whose replays have another `length`.
        is_dense: whether slot s of every sequence holds position s, for all slots in use; on the host.
        in_prompt: whether the call runs tokens of a prompt, even if it is a single one; on the host.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        self.positions = torch.full((batch, capacity), -1, dtype=torch.int32, device=device)
        self.start = torch.zeros(1, dtype=torch.int32, device=device)
        self.filled = torch.zeros(1, dtype=torch.int32, device=device)
        self.length = 0
        self.seen = 0
        self.is_replayed = False
        self.is_dense = True
        self.in_prompt = False

    @property
    def reads(self) -> int:
        """Number of slots that a call reads; all slots in a CUDA graph, whose kernels read `filled` instead."""
        return self.positions.shape[1] if self.is_replayed else self.length

    def append(self, positions: Tensor) -> None:
        """Enter the positions `[rows, T]` of a call's tokens, with device operations only."""
        torch.ops.effpass.append_positions(self.positions, self.start, self.filled, positions)

    def crop(self, length: int) -> None:
        """Empty all slots from `length` on."""
        self.positions[:, length:] = -1
        self.filled.fill_(length)
        self.seen = self.seen - self.length + length if length else 0
        self.length = length
        self.is_dense |= length == 0


class BufferedLayer(CacheLayerMixin):
    """Keys `[B, G, S, K]` and values `[B, G, S, V]` of one layer, in buffers of fixed address.

    Args:
        slots: positions of the tokens in the buffers; shared by layers that hold the same tokens.
        window: size of the sliding window in positions; 0 for full attention.

    Attributes:
        latents: if the model caches latents (MLA), the buffer `[B, 1, S, K + V]` that keys and values are views of;
            otherwise None.
        pool: if keys and values are in host memory, the pool of their blocks that are on the device; otherwise None.
        keeps_places: whether a token stays in its slot until it is cropped.
        keeps_keys: whether the layer caches keys and values; False for linear attention, which caches a state.
    """

    is_compileable = True
    is_croppable = True
    latents: Tensor | None = None
    pool: BlockPool | None = None
    keeps_places = True
    keeps_keys = True

    def __init__(self, slots: Slots, window: int) -> None:
        super().__init__()
        self.slots = slots
        self.window = window

    @property
    def is_sliding(self) -> bool:
        return self.window > 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, capacity = self.slots.positions.shape
        # Zeros, because a masked slot has weight 0, and 0 times uninitialized memory may be NaN.
        sizes = [key_states.shape[3], value_states.shape[3]]
        if key_states.shape[1] == 1 and sizes[0] != sizes[1]:  # latents (MLA): both parts together are one key
            self.latents = key_states.new_zeros(batch, 1, capacity, sum(sizes))
            self.keys, self.values = self.latents.split(sizes, -1)
        else:
            self.keys, self.values = (
                x.new_zeros(batch, x.shape[1], capacity, x.shape[3]) for x in (key_states, value_states)
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys `[rows, G, T, K]` and values `[rows, G, T, V]` to the current call's slots.

        Returns:
            Keys `[rows, G, reads, K]` and values `[rows, G, reads, V]` of the slots to read (:attr:`Slots.reads`).
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        rows, reads = key_states.shape[0], self.slots.reads
        if self.latents is not None and not self.slots.is_replayed:  # one write, as compilers reject two to one buffer
            latents = self.latents[:rows]
            latents[:, :, reads - key_states.shape[2] : reads] = torch.cat((key_states, value_states), -1)
            keys, values = latents[:, :, :reads].split((key_states.shape[3], value_states.shape[3]), -1)
            return keys, values
        keys, values = self.keys, self.values
        if rows < keys.shape[0]:
            keys, values = keys[:rows], values[:rows]
        if self.slots.is_replayed:
            torch.ops.effpass.cache_write(keys, values, key_states, value_states, self.slots.start)
        else:
            new = slice(reads - key_states.shape[2], reads)
            keys[:, :, new], values[:, :, new] = key_states, value_states
        return (keys, values) if reads == keys.shape[2] else (keys[:, :, :reads], values[:, :, :reads])

    def joined(self, key: Tensor, value: Tensor, tokens: int) -> Tensor:
        """Return latents `[rows, 1, S, K + V]` from the `key` and `value` that :meth:`update` returned."""
        if self.latents is None:
            return torch.cat((key, value), -1)
        return self.latents[: key.shape[0], :, : key.shape[2]]

    def get_seq_length(self) -> int:
        return self.slots.seen

    def get_max_length(self) -> int:
        return self.slots.positions.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.length, 0  # includes the current call's tokens

    def reset(self) -> None:
        self.slots.crop(0)
        self.forget()

    def forget(self) -> None:
        """Drop state outside of the slots, called when all sequences become empty."""

    def own_state(self) -> list[Tensor]:
        """Return the tensors outside of the slots that a decode step writes."""
        return []


class Reader(Protocol):
    """Interface of an object that replaces the default attention over one cache, such as sparse attention.

    Attributes:
        keeps_queries: whether :meth:`keep_query` must be called.
    """

    keeps_queries: bool = False

    def keep_query(self, index: int, query: Tensor) -> None:
        """Receive the last query `[B, H, 1, K]` of a prompt or of a chunk of it, absorbed for cached latents."""
        return

    def attend(
        self, cache: DecodeCache, index: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float
    ) -> Tensor | None:
        """Return the output `[B, T, H, V]`, or None for the default attention; see :meth:`DecodeCache.attended`."""

    def ready(self, cache: DecodeCache) -> Hashable:
        """Prepare for a decode step, on the host; a CUDA graph is recorded anew if the returned value changes."""

    def forget(self) -> None:
        """Drop derived state, called when the slots may hold other tokens than before."""

    def state(self) -> list[Tensor]:
        """Return the tensors to restore after the trial steps that precede the recording of a CUDA graph."""
        return []


class DecodeCache(Cache):
    """A transformers cache with fixed buffers for `batch` sequences of up to `capacity` tokens.

    Args:
        config: config of the model, which gives the number of layers and their sliding windows.
        batch: number of sequences B that the buffers hold.
        capacity: number of slots S of the buffers.
        device: device of the buffers.
        layers: buffers of the layers; None creates buffers of `capacity` slots that share their :class:`Slots`.

    Attributes:
        query_positions: int32 `[rows, T]`, positions of the current call's tokens.
        reader: object that replaces the default attention; None for the default.
        session: the :class:`~effpass.runtime.session.Session` that decodes into the cache, if the user holds the cache.

    Raises:
        ModelError: if a layer caches something other than keys and values.
    """

    reader: Reader | None = None

    def __init__(
        self,
        config: Any,
        batch: int,
        capacity: int,
        device: torch.device,
        layers: Sequence[BufferedLayer] | None = None,
    ) -> None:
        if layers is None:
            slots = Slots(batch, capacity, device)
            layers = new_layers(config, slots, lambda window: BufferedLayer(slots, window))
        self.slots = layers[0].slots
        super().__init__(layers=list(layers))
        self.batch, self.capacity = batch, capacity
        self.query_positions = self.slots.positions[:, :0]
        self.session: object = None

    def buffers(self, index: int) -> BufferedLayer:
        """Return the buffers of layer `index`."""
        layer = self.layers[index]
        assert isinstance(layer, BufferedLayer)
        return layer

    def distinct_slots(self) -> Iterator[Slots]:
        """Yield each distinct :class:`Slots` of the layers once."""
        yield from dict.fromkeys(self.buffers(i).slots for i in range(len(self.layers)))

    def append(self, positions: Tensor) -> None:
        """Enter the positions of a call's tokens on the device: int32 `[rows, T]`, -1 for padding."""
        self.query_positions = positions
        for slots in self.distinct_slots():
            slots.append(positions)

    def advance(self, tokens: int) -> None:
        """Count a call's tokens on the host. Call this and :meth:`append` before the model runs."""
        for slots in self.distinct_slots():
            slots.length += tokens
            slots.seen += tokens

    @property
    def takes_padding(self) -> bool:
        """Whether tokens behind a prompt that have no position leave no trace but slots, which :meth:`crop` empties."""
        return type(self) is DecodeCache and self.reader is None and self._are_plain(BufferedLayer)

    def _are_plain(self, kind: type[BufferedLayer]) -> bool:
        """Return whether all layers are of this kind and hold keys and values of their own."""
        return all(type(layer) is kind and layer.latents is None for layer in self.layers)

    def attended(self, index: int, query: Tensor, keys: Tensor, scale: float, softcap: float) -> None:
        """Hook that is called after layer `index` has attended, for caches that rank tokens by their attention.

        Args:
            index: index of the layer.
            query: `[B, H, T, K]`, queries of the call.
            keys: `[B, G, S, K]`, keys of the slots that were read.
            scale: factor on the scores.
            softcap: soft cap on the scores; 0 for none.
        """

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens.

        Raises:
            EffpassError: if a layer has a state that can't be reverted.
        """
        if tokens_to_remove < 0 and not self.is_croppable:
            raise cannot_crop(-tokens_to_remove)
        for slots in self.distinct_slots():
            slots.crop(slots.length + min(tokens_to_remove, 0))

    def reset(self) -> None:
        self.changed()
        for slots in self.distinct_slots():
            slots.crop(0)
        for index in range(len(self.layers)):
            self.buffers(index).forget()

    def ready(self) -> Hashable:
        """Prepare for a decode step; see :meth:`Reader.ready`."""
        return None if self.reader is None else self.reader.ready(self)

    def stepped(self) -> None:
        """Hook that is called at the end of every decode step, to wait for work on other streams."""

    def state(self) -> list[Tensor]:
        """Return the tensors to restore after the trial steps that precede the recording of a CUDA graph."""
        own = [t for index in range(len(self.layers)) for t in self.buffers(index).own_state()]
        own += [] if self.reader is None else self.reader.state()
        return [t for slots in self.distinct_slots() for t in (slots.positions, slots.filled)] + own

    def changed(self) -> None:
        """Hook that is called when slots may hold other tokens than at the last decode step, as after a prompt."""
        if self.reader is not None:
            self.reader.forget()


def cannot_crop(tokens: int) -> EffpassError:
    """Return the error for removing some, but not all, tokens from a recurrent state."""
    return EffpassError(
        f"{tokens} tokens were to be taken back, and linear attention has no state from before them",
        hint="begin again with an empty cache; assisted and speculative generation need layers that keep their keys",
    )


def new_layers(config: Any, slots: Slots, make: Callable[[int], BufferedLayer]) -> list[BufferedLayer]:
    """Create the buffers of a model's layers.

    Args:
        config: config of the model.
        slots: slots of the buffers for linear-attention layers, which use its batch size and device.
        make: function that creates the buffers of an attention layer from its sliding window.
    """
    windows = layer_windows(config)
    if not _is_hybrid(config):
        return [make(window) for window in windows]
    from effpass.runtime.linear_attention.hybrid import linear_layers
    from effpass.runtime.linear_attention.state import StateBuffers

    linear, settings = linear_layers(config)
    return [StateBuffers(slots, settings) if i in linear else make(window) for i, window in enumerate(windows)]


def full_layers(config: Any) -> tuple[list[int], dict[int, str]]:
    """Return the layers that cache the keys of all tokens, and for each other layer the reason as text.

    Raises:
        ModelError: as :func:`layer_windows`.
    """
    linear = config.linear_attention["layers"] if _is_hybrid(config) else []
    windows = layer_windows(config)
    others = {
        i: "it is linear attention, which keeps a state" if i in linear else f"it sees {window} positions only"
        for i, window in enumerate(windows)
        if window or i in linear
    }
    return [i for i in range(len(windows)) if i not in others], others


def _is_hybrid(config: Any) -> bool:
    return getattr(config, "linear_attention", None) is not None


def layer_windows(config: Any) -> list[int]:
    """Return the sliding window of each layer in positions, 0 for full attention.

    Linear-attention layers of a hybrid have the window of the attention layer that they replaced.

    Raises:
        ModelError: if a layer caches something other than keys and values, or shares another layer's cache.
    """
    windows = []
    text = config.get_text_config(decoder=True)
    if getattr(text, "num_kv_shared_layers", 0):
        raise ModelError(
            f"{text.model_type} shares key-value caches between layers; the decode engine has one per layer"
        )
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        raise ModelError(
            f"{text.model_type} attends within chunks, and the decode engine only to all tokens or to a window",
            hint="transformers' own generate runs it",
        )
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ModelError(
                f"layer {index} of {text.model_type} caches a {type(layer).__name__}; the decode engine holds keys and"
                " values only",
                hint="transformers' own generate runs it",
            )
        windows.append(getattr(layer, "sliding_window", 0) or 0)
    return windows
