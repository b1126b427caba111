"""Sparse attention in the decode engine: keeps an index of each layer's keys, and decides when it is used.

A :class:`SparseReader` replaces the default attention over one cache; the pass `sparse_attention` installs it. In
layers that hold at least `dense_below` tokens, decode steps choose keys through the index and attend with
:mod:`effpass.lowering.ops.two_level_attention`; with fewer tokens they use the default attention. The index is built
from the cached keys before the first sparse step, and each step adds its own token. It is rebuilt after a prompt has
filled the cache, or after cached tokens have moved.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effpass.core.errors import ModelError
from effpass.lowering.ops.block_sparse_attention import BlockSelection, block_sparse
from effpass.lowering.ops.two_level_attention import attend
from effpass.lowering.ops.two_level_attention_index import KeyIndex, Selection
from effpass.runtime.cache import BufferedLayer, DecodeCache
from effpass.runtime.sparse_audit import Audit

__all__ = ["SparseReader", "SparseSettings"]


@dataclass(frozen=True)
class SparseSettings:
    """Settings that the readers of one model share.

    Attributes:
        selection: settings of the choice of keys in decode steps.
        dense_below: number of tokens below which a layer uses the default attention in decode steps.
        channels: int32 `[G, C]` by layer, channels of the keys that labels are made from; None for all channels.
        prefill: settings of the choice of blocks in prefill; None for dense prefill.
        prefill_below: number of tokens below which prefill is dense.
        audits: quality measurements by layer; None for no measurement.
    """

    selection: Selection
    dense_below: int
    channels: Mapping[int, Tensor] | None = None
    prefill: BlockSelection | None = None
    prefill_below: int = 0
    audits: dict[int, Audit] | None = None

    def __call__(self) -> SparseReader:
        """Create a reader for a cache."""
        return SparseReader(self)

    def __deepcopy__(self, memo: Any) -> SparseSettings:
        return self  # a copy of the model shares them


@dataclass
class _Layer:
    """State of one layer.

    Attributes:
        index: index of the layer's keys.
        keys: buffer of the keys that are indexed.
        indexed: number of slots that are in the index.
        is_sparse: whether the next step attends sparsely.
    """

    index: KeyIndex
    keys: Tensor
    indexed: int = 0
    is_sparse: bool = False


@dataclass
class SparseReader:
    """Sparse attention over one cache; see :class:`~effpass.runtime.cache.Reader`.

    Attributes:
        settings: settings shared by the readers of the model.
        layers: state by layer index.
        queries: last query of the prompt by layer index, used for the first pipelined step.
    """

    settings: SparseSettings
    layers: dict[int, _Layer] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)

    @property
    def keeps_queries(self) -> bool:
        """Whether selection is pipelined: the first step then chooses by the prompt's last query."""
        return self.settings.selection.is_pipelined

    def keep_query(self, index: int, query: Tensor) -> None:
        self.queries[index] = query

    def attend(
        self, cache: DecodeCache, index: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float
    ) -> Tensor | None:
        """Return the output `[B, T, H, V]` of a sparse decode step or prefill, or None to use the default attention."""
        rows, _, tokens, _ = query.shape
        layer = cache.buffers(index)
        if layer.window:
            return None
        if tokens > 1:
            return self._prompt(cache, layer, query, keys, values, scale, softcap)
        if layer.slots.in_prompt:  # a piece of one token; the index is updated after the prompt
            return None
        state = self.layers.get(index)
        if state is None or not state.is_sparse:
            return None
        slots = layer.slots
        positions = slots.positions if rows == slots.positions.shape[0] else slots.positions[:rows]
        stored, of_values = _stored(layer, rows, values.shape[-1])
        table = host = None
        pool = None if layer.pool is None else layer.pool.rows(rows)
        near_keys, near_values = stored, of_values
        if pool is not None:
            table, host = pool.block_table, pool.host
            near_keys, near_values = pool.cached(query.shape[-1], values.shape[-1])
        out = attend(
            state.index, query, near_keys, near_values, positions, cache.query_positions, slots.filled, scale, softcap,
            table, host,
        )  # fmt: skip
        if pool is not None:
            selection, chosen = state.index.selection, state.index.rows(rows)
            if selection.levels == "blocks":
                pool.fetch(chosen.chosen_blocks, slots.filled, selection.block)
            else:
                pool.fetch(chosen.chosen_tokens, slots.filled, 1)
        if self.settings.audits is not None:
            self.settings.audits[index].look(
                state.index.rows(rows), query, stored, positions, cache.query_positions, scale
            )
        return out

    def _prompt(
        self, cache: DecodeCache, layer: BufferedLayer, query: Tensor, keys: Tensor, values: Tensor, scale: float,
        softcap: float,
    ) -> Tensor | None:  # fmt: skip
        selection, slots = self.settings.prefill, layer.slots
        reads = keys.shape[2]
        if selection is None or reads < max(self.settings.prefill_below, selection.least):
            return None
        positions = slots.positions[: query.shape[0], :reads]
        return block_sparse(selection, query, keys, values, positions, cache.query_positions, scale, softcap)

    def ready(self, cache: DecodeCache) -> Hashable:
        """Update the indices, and return for each layer whether the next step attends sparsely."""
        for index in range(len(cache.layers)):
            layer = cache.buffers(index)
            if layer.window or not layer.keeps_keys or not layer.is_initialized:
                continue
            state = self._layer(cache, index, layer)
            length = layer.slots.length
            # Offloaded layers are always sparse: reading all of a layer over the bus at every step is too slow.
            state.is_sparse = length >= self.settings.dense_below or layer.pool is not None
            if state.is_sparse:
                known = state.indexed
                if known > length:  # tokens were cropped or have moved
                    known = length if layer.keeps_places else 0
                if known < length:
                    self._catch_up(index, state, layer, known)
                state.indexed = length + 1  # the step enters its own token
        return tuple(state.is_sparse for state in self.layers.values())

    def forget(self) -> None:
        for state in self.layers.values():
            state.indexed = 0

    def state(self) -> list[Tensor]:
        """Return the sums of the audits; an index needs no restoring, since a repeated step writes the same values."""
        return [audit.sums for audit in (self.settings.audits or {}).values()]

    def _layer(self, cache: DecodeCache, index: int, layer: BufferedLayer) -> _Layer:
        """Return the state of a layer, recreated if the layer's buffers have changed."""
        if layer.keys is None:  # recipes are checked before; this model was prepared twice
            raise ModelError(
                f"layer {index} stores its keys in another type ({type(layer).__name__}), and sparse_attention reads"
                " them as they are",
                hint="set kv_cache_dtype: auto in prefix_kv",
            )
        keys, _ = _stored(layer, cache.batch, 1)
        state = self.layers.get(index)
        if state is None or state.keys.data_ptr() != keys.data_ptr() or state.keys.shape != keys.shape:
            (batch, groups, slots, size), chosen = keys.shape, self.settings.channels
            channels = torch.arange(size, dtype=torch.int32).expand(groups, -1) if chosen is None else chosen[index]
            channels = channels.contiguous().to(keys.device)
            index_of = KeyIndex.empty(self.settings.selection, channels, batch, slots, size, keys.dtype)
            state = self.layers[index] = _Layer(index_of, keys)
        return state

    def _catch_up(self, index: int, state: _Layer, layer: BufferedLayer, known: int) -> None:
        """Add the tokens from slot `known` on to the index, and score blocks for the first step of a pipeline."""
        slots = layer.slots
        start = torch.tensor([known], dtype=torch.int32, device=state.keys.device)
        state.index.add(state.keys, slots.positions, start, slots.filled, slots.length - known)
        if state.index.selection.is_pipelined:
            query = self.queries.pop(index, None)
            if query is None:
                raise ModelError(
                    f"layer {index}: the first step of a pipeline needs the prompt's last query, which this cache does "
                    "not hand on",
                    hint="leave pipelined out beside passes that stage a prompt (prefix_kv)",
                )
            part, selection = state.index.rows(query.shape[0]), state.index.selection
            torch.ops.effpass.score_blocks(
                query, part.statistics, part.seen, slots.filled, part.scores, selection.block, selection.statistic,
                selection.aggregation,
            )  # fmt: skip


def _stored(layer: BufferedLayer, rows: int, value_size: int) -> tuple[Tensor, Tensor]:
    """Return keys and values of all slots for the first `rows` sequences; for latents, values are part of the keys."""
    keys, values = layer.keys, layer.values
    assert keys is not None
    assert values is not None
    if layer.latents is not None:
        keys = layer.latents
        values = keys[..., :value_size]
    return (keys, values) if rows == keys.shape[0] else (keys[:rows], values[:rows])
