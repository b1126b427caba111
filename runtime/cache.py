"""The decode engine's cache: fixed buffers, and for every slot of them the position that stands there.

A token has a *position*, its place in its own sequence, and a *slot*, its place in the buffers. The two differ where a
sequence is padded on the left, and where a pass evicts keys. What a query may read follows from positions alone

    slot s is visible to query t  ⇔  0 ≤ position[s] ≤ position[t]  and  position[t] − position[s] < window

so that padding, eviction and layers of different lengths need no mask, and no mask is ever built.
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
    """Positions of the slots that some layers share.

    Attributes:
        positions: int32 `[B, S]`; -1 marks an empty slot and padding.
        start: int32 `[1]`, on the device: the slot of the current call's first token.
        filled: int32 `[1]`, on the device: slots in use, the current call's included.
        length: the same number on the host (*physical length*).
        seen: tokens entered, those that gave up their slots included (*logical length*); on the host.
        is_replayed: the call is being recorded in a CUDA graph, and `length` is not what it will be in a replay.
        is_dense: position s stands in slot s of every row, as far as slots are filled; known on the host.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        self.positions = torch.full((batch, capacity), -1, dtype=torch.int32, device=device)
        self.start = torch.zeros(1, dtype=torch.int32, device=device)
        self.filled = torch.zeros(1, dtype=torch.int32, device=device)
        self.length = 0
        self.seen = 0
        self.is_replayed = False
        self.is_dense = True

    @property
    def reads(self) -> int:
        """How many slots a call has to look at; kernels in a CUDA graph look up `filled` instead."""
        return self.positions.shape[1] if self.is_replayed else self.length

    def append(self, positions: Tensor) -> None:
        """Enter the positions `[rows, T]` of a call's tokens; device operations only. Rows beyond stay empty."""
        torch.ops.effpass.append_positions(self.positions, self.start, self.filled, positions)

    def crop(self, length: int) -> None:
        """Empty all slots from `length` on."""
        self.positions[:, length:] = -1
        self.filled.fill_(length)
        self.seen = self.seen - self.length + length if length else 0
        self.length = length
        self.is_dense |= length == 0


class BufferedLayer(CacheLayerMixin):
    """Keys `[B, G, S, K]` and values `[B, G, S, V]` of one layer in buffers that stay where they are.

    Args:
        slots: which positions stand in the buffers; shared by layers that hold the same tokens.
        window: sliding window in positions; 0 for full attention.

    Attributes:
        latents: where the model caches latents (MLA), keys and values side by side `[B, 1, S, K + V]`; they are views.
        pool: where keys and values are in host memory, which blocks of them are on the device.
        keeps_places: what stands in a slot stays there until it is cropped.
        keeps_keys: False for linear attention, which keeps a state.
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
        # Zeros: a masked slot has weight 0, and 0 times what happened to lie in memory may be NaN.
        sizes = [key_states.shape[3], value_states.shape[3]]
        if key_states.shape[1] == 1 and sizes[0] != sizes[1]:  # latents (MLA), whose two parts are read as one key
            self.latents = key_states.new_zeros(batch, 1, capacity, sum(sizes))
            self.keys, self.values = self.latents.split(sizes, -1)
        else:
            self.keys, self.values = (
                x.new_zeros(batch, x.shape[1], capacity, x.shape[3]) for x in (key_states, value_states)
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys `[rows, G, T, K]` and values.

        Returns:
            Keys `[rows, G, S, K]` and values of the slots to read, with the slots' positions.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        rows, reads = key_states.shape[0], self.slots.reads
        if self.latents is not None and not self.slots.is_replayed:  # one write: a compiler takes no two to one buffer
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
        """Latents `[rows, 1, S, K + V]`, of which :meth:`update` returned `key` and `value` for `tokens` new ones."""
        if self.latents is None:
            return torch.cat((key, value), -1)
        return self.latents[: key.shape[0], :, : key.shape[2]]

    def get_seq_length(self) -> int:
        return self.slots.seen

    def get_max_length(self) -> int:
        return self.slots.positions.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.length, 0  # the current call's tokens have been entered

    def reset(self) -> None:
        self.slots.crop(0)
        self.forget()

    def forget(self) -> None:
        """No sequence has a token; what is in slots need not be touched."""

    def own_state(self) -> list[Tensor]:
        """What a step writes that stands in no slot."""
        return []


class Reader(Protocol):
    """What attends to the layers of a cache in a way of its own; its state is that cache's.

    Attributes:
        keeps_queries: :meth:`keep_query` is to be called.
    """

    keeps_queries: bool = False

    def keep_query(self, index: int, query: Tensor) -> None:
        """The last query `[B, H, 1, K]` of a prompt, or of a piece of it, for keys as they are cached."""
        return

    def attend(
        self, cache: DecodeCache, index: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float
    ) -> Tensor | None:
        """`[B, T, H, V]`, or None where the layer is attended to as by default; arguments are those of `attended`."""

    def ready(self, cache: DecodeCache) -> Hashable:
        """Called before every step, on the host; where the result is another, a step does something else."""

    def forget(self) -> None:
        """The slots hold other tokens than before."""

    def state(self) -> list[Tensor]:
        """What a step that was only tried must leave as it was."""
        return []


class DecodeCache(Cache):
    """A transformers cache with fixed buffers for `batch` sequences of up to `capacity` tokens.

    Args:
        config: the model's; says how many layers there are, and which slide.
        batch: rows B of the buffers.
        capacity: slots S of the buffers.
        device: where they are.
        layers: the layers' buffers; by default all of `capacity` slots, which hold the same tokens in every layer.

    Attributes:
        query_positions: int32 `[rows, T]`: positions of the current call's tokens.
        reader: attends in a way of its own; None for none.

    Raises:
        ModelError: a layer keeps something other than keys and values.
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
        self.session: object = None  # what decodes into it, where the user holds it

    def buffers(self, index: int) -> BufferedLayer:
        """The layer's buffers."""
        layer = self.layers[index]
        assert isinstance(layer, BufferedLayer)
        return layer

    def distinct_slots(self) -> Iterator[Slots]:
        """Every :class:`Slots` of the layers, once."""
        yield from dict.fromkeys(self.buffers(i).slots for i in range(len(self.layers)))

    def append(self, positions: Tensor) -> None:
        """Enter the positions int32 `[rows, T]` of a call's tokens, -1 for padding; on the device."""
        self.query_positions = positions
        for slots in self.distinct_slots():
            slots.append(positions)

    def advance(self, tokens: int) -> None:
        """The same on the host. Both come before the call."""
        for slots in self.distinct_slots():
            slots.length += tokens
            slots.seen += tokens

    def attended(self, index: int, query: Tensor, keys: Tensor, scale: float, softcap: float) -> None:
        """Called when layer `index` has attended; a cache that ranks its tokens looks on here.

        Args:
            index: the layer.
            query: `[B, H, T, K]`.
            keys: `[B, G, S, K]` of the slots that were read.
            scale: factor on the scores.
            softcap: bound on the scores; 0 for none.
        """

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens.

        Raises:
            EffpassError: a layer keeps a state that can't be taken back.
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
        """Called before every decode step; see :class:`Reader`."""
        return None if self.reader is None else self.reader.ready(self)

    def stepped(self) -> None:
        """Called at the end of every decode step, which may have work under way beside the device's stream."""

    def state(self) -> list[Tensor]:
        """What a step that was only tried must leave as it was."""
        own = [t for index in range(len(self.layers)) for t in self.buffers(index).own_state()]
        own += [] if self.reader is None else self.reader.state()
        return [t for slots in self.distinct_slots() for t in (slots.positions, slots.filled)] + own

    def changed(self) -> None:
        """Called when slots may hold other tokens than at the last step: after a prompt."""
        if self.reader is not None:
            self.reader.forget()


def cannot_crop(tokens: int) -> EffpassError:
    """What is said where some tokens, and not all, are to be taken back from a state."""
    return EffpassError(
        f"{tokens} tokens were to be taken back, and linear attention has no state from before them",
        hint="begin again with an empty cache; assisted and speculative generation need layers that keep their keys",
    )


def new_layers(config: Any, slots: Slots, make: Callable[[int], BufferedLayer]) -> list[BufferedLayer]:
    """Buffers of a model's layers.

    Args:
        config: the model's.
        slots: for linear attention, which needs the number of rows.
        make: for a layer that keeps keys, from its window.
    """
    windows = layer_windows(config)
    if not _is_hybrid(config):
        return [make(window) for window in windows]
    from effpass.runtime.linear_attention.hybrid import linear_layers
    from effpass.runtime.linear_attention.state import StateBuffers

    linear, settings = linear_layers(config)
    return [StateBuffers(slots, settings) if i in linear else make(window) for i, window in enumerate(windows)]


def full_layers(config: Any) -> tuple[list[int], dict[int, str]]:
    """Which layers keep keys of all tokens, and what the others do instead, in words.

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
    """The sliding window of each of the model's layers, 0 where attention is full.

    A hybrid's layers of linear attention have those of what they replaced.

    Raises:
        ModelError: a layer keeps something else, or has no cache of its own.
    """
    windows = []
    text = config.get_text_config(decoder=True)
    if getattr(text, "num_kv_shared_layers", 0):
        raise ModelError(
            f"{text.model_type} shares key-value caches between layers; the decode engine has one per layer"
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
