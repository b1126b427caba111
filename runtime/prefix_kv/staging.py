"""Staging of a prompt in a cache with a budget: all of its tokens, and the attention that they receive.

While a prompt runs, each layer is *staged*: its keys and values of all tokens are in temporary buffers, until the
tokens to keep are selected and copied to the layer's own buffers. If the selection depends on that layer alone, it
takes place as soon as the layer has attended to the end of the prompt; otherwise after the last layer has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import effpass.lowering.ops.received_attention  # noqa: F401  (registers the operator)
from effpass.runtime.cache import BufferedLayer, DecodeCache, Slots
from effpass.runtime.linear_attention.state import StateBuffers
from effpass.runtime.prefix_kv.layer import EvictingLayer

__all__ = ["StagedLayer", "Staging"]


class StagedLayer(BufferedLayer):
    """Temporary buffers of a layer: the tokens kept of earlier turns, sorted by position, and slots for the prompt.

    Args:
        kept: the layer that holds the kept tokens of earlier turns, and decodes later.
        slots: positions of the tokens in the temporary buffers.
        rows: number of sequences.
        before: number of slots with tokens of earlier turns.

    Attributes:
        from_all, from_last, pinned: `[rows, S]`, as in :class:`EvictingLayer`.
    """

    def __init__(self, kept: EvictingLayer, slots: Slots, rows: int, before: int) -> None:
        super().__init__(slots, kept.window)
        self.kept = kept
        batch, capacity = slots.positions.shape
        device = slots.positions.device
        self.from_all, self.from_last = torch.zeros(2, batch, capacity, device=device)
        self.pinned = torch.zeros(batch, capacity, dtype=torch.bool, device=device)
        self._order: Tensor | None = None
        if before:
            sorted_, self._order = kept.slots.positions[:rows, :before].sort(dim=1, stable=True)
            slots.positions[:, :before] = sorted_
            for table, of_kept in zip(self.tables(), kept.tables(), strict=True):
                table[:, :before] = of_kept[:rows, :before].gather(1, self._order)
            slots.filled.fill_(before)
            slots.length = before
            slots.is_dense = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if self._order is None:
            return
        assert self.keys is not None
        assert self.values is not None
        rows, before = self._order.shape
        for buffer, kept in zip((self.keys, self.values), self.kept.get(rows), strict=True):
            order = self._order[:, None, :, None].expand_as(kept)
            buffer[:, :, :before] = kept.gather(2, order)

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.from_all, self.from_last, self.pinned

    def free(self) -> None:
        self.keys = self.values = self.latents = None
        self.is_initialized = False


class StagedState(StateBuffers):
    """State of linear attention for some sequences of a batch, as views of the state that decoding continues with."""

    def __init__(self, kept: StateBuffers, slots: Slots, row: int) -> None:
        super().__init__(slots, kept.settings)
        self.kept, self.row = kept, row

    def read(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        conv, state = self.kept.read(self.kept.slots.positions.shape[0], dtype)
        here = slice(self.row, self.row + rows)
        self.conv, self.state, self.is_initialized = conv[here], state[here], True
        return self.conv, self.state


class Staging(DecodeCache):
    """A cache of staged layers for one prompt of some sequences of a batch.

    Args:
        cache: the cache that decoding reads, with the kept tokens of earlier turns.
        config: config of the model.
        row: index in `cache` of the first sequence.
        rows: number of sequences.
        tokens: number of tokens of the prompt.
        goes_on: whether `cache` holds tokens of earlier turns.
        importance: attention to sum up, :attr:`Policy.importance`.
        window: number of last tokens whose attention is summed separately, :attr:`Policy.window`.
        settle: function that is called with the index of each layer as soon as it has attended to the whole prompt;
            None if tokens are selected after the last layer.
    """

    def __init__(
        self,
        cache: DecodeCache,
        config: Any,
        row: int,
        rows: int,
        tokens: int,
        goes_on: bool,
        importance: str,
        window: int,
        settle: Callable[[int], None] | None,
    ) -> None:
        device = cache.slots.positions.device
        alike, layers = Slots(rows, tokens, device), list[BufferedLayer]()
        for kept in cache.layers:
            if isinstance(kept, StateBuffers):
                layers.append(StagedState(kept, alike, row))
                continue
            assert isinstance(kept, EvictingLayer)
            before = kept.slots.length if goes_on else 0
            slots = Slots(rows, before + tokens, device) if goes_on else alike
            layers.append(StagedLayer(kept, slots, rows, before))
        super().__init__(config, rows, tokens, device, layers)
        self._left = self._tokens = tokens
        self._importance, self._window = importance, window
        self._settle = settle

    def staged(self, index: int) -> StagedLayer:
        layer = self.layers[index]
        assert isinstance(layer, StagedLayer)
        return layer

    def advance(self, tokens: int) -> None:
        super().advance(tokens)
        self._left -= tokens

    @torch.compiler.disable
    def attended(self, index: int, query: Tensor, keys: Tensor, scale: float, softcap: float) -> None:
        layer = self.staged(index)
        if not layer.is_sliding:
            if self._importance in ("full", "both"):
                self._add(layer, layer.from_all, query, keys, query.shape[2], scale, softcap)
            last = min(self._window - self._left, query.shape[2])
            if self._importance in ("window", "both") and last > 0:
                self._add(layer, layer.from_last, query, keys, last, scale, softcap)
        if self._left == 0 and self._settle is not None:
            self._settle(index)

    def _add(
        self, layer: StagedLayer, table: Tensor, query: Tensor, keys: Tensor, last: int, scale: float, softcap: float
    ) -> None:
        """Add the attention from the `last` tokens of the call to `table`."""
        reads = keys.shape[2]
        table[:, :reads] += torch.ops.effpass.received_attention(
            query[:, :, -last:], keys, layer.slots.positions[:, :reads], self.query_positions[:, -last:], scale, softcap
        )
