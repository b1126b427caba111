"""Sparse attention in the decode engine: the index of each layer's keys, and when it is used.

A step attends through :mod:`effpass.lowering.ops.two_level_attention` where a layer holds `dense_below` tokens or more,
and as by default below that. The index is made when the first sparse step comes, from the keys that stand in the cache,
and kept up by the steps themselves; it is made anew where the cache was filled or its tokens moved.
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
    """What the readers of one model share.

    Attributes:
        selection: which keys a step attends to.
        dense_below: a layer with fewer tokens is attended to as by default.
        channels: int32 `[G, C]` for each layer, the channels of its labels; None for all.
        prefill: which blocks prompts attend to; None for all.
        audits: for each layer, how much of what it should choose it does; empty where nobody asks.
    """

    selection: Selection
    dense_below: int
    channels: Mapping[int, Tensor] | None = None
    prefill: BlockSelection | None = None
    audits: dict[int, Audit] | None = None

    def __call__(self) -> SparseReader:
        """A reader for one more cache."""
        return SparseReader(self)

    def __deepcopy__(self, memo: Any) -> SparseSettings:
        return self  # a copy of the model shares them


@dataclass
class _Layer:
    """One layer's index, and the buffer that it is of."""

    index: KeyIndex
    keys: Tensor
    indexed: int = 0
    is_sparse: bool = False


@dataclass
class SparseReader:
    """The :class:`~effpass.runtime.cache.Reader` of one cache."""

    settings: SparseSettings
    layers: dict[int, _Layer] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)

    @property
    def keeps_queries(self) -> bool:
        """A pipeline's first step has no step before it, and chooses by the prompt's last query."""
        return self.settings.selection.is_pipelined

    def keep_query(self, index: int, query: Tensor) -> None:
        self.queries[index] = query

    def attend(
        self, cache: DecodeCache, index: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float
    ) -> Tensor | None:
        """`[B, T, H, V]` of a sparse step or a sparse prompt; None for a dense one."""
        rows, _, tokens, _ = query.shape
        layer = cache.buffers(index)
        if layer.window:
            return None
        if tokens > 1:
            return self._prompt(cache, layer, query, keys, values, scale, softcap)
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
            how, chosen = state.index.selection, state.index.rows(rows)
            if how.levels == "blocks":
                pool.fetch(chosen.chosen_blocks, slots.filled, how.block)
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
        how, slots = self.settings.prefill, layer.slots
        reads = keys.shape[2]
        if how is None or reads <= max(self.settings.dense_below, how.least(reads)):
            return None
        positions = slots.positions[: query.shape[0], :reads]
        return block_sparse(how, query, keys, values, positions, cache.query_positions, scale, softcap)

    def ready(self, cache: DecodeCache) -> Hashable:
        """Bring the indices up to date; what is returned says which layers are attended to sparsely."""
        for index in range(len(cache.layers)):
            layer = cache.buffers(index)
            if layer.window or not layer.keeps_keys or not layer.is_initialized:
                continue
            state = self._layer(cache, index, layer)
            length = layer.slots.length
            # All of a layer in host memory can't be read at every step.
            state.is_sparse = length >= self.settings.dense_below or layer.pool is not None
            if state.is_sparse:
                known = state.indexed
                if known > length:  # cropped, or tokens have moved
                    known = length if layer.keeps_places else 0
                if known < length:
                    self._catch_up(index, state, layer, known)
                state.indexed = length + 1  # the step enters its own token
        return tuple(state.is_sparse for state in self.layers.values())

    def forget(self) -> None:
        for state in self.layers.values():
            state.indexed = 0

    def state(self) -> list[Tensor]:
        """Sums of audits; an index is the same after a step that is taken again."""
        return [audit.sums for audit in (self.settings.audits or {}).values()]

    def _layer(self, cache: DecodeCache, index: int, layer: BufferedLayer) -> _Layer:
        """The layer's state; another one where its buffers are others."""
        if layer.keys is None:  # a recipe says it before; this is a model that was prepared twice
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
        """Enter the tokens from slot `known` on."""
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
            of, how = state.index.rows(query.shape[0]), state.index.selection
            torch.ops.effpass.score_blocks(
                query, of.statistics, of.seen, slots.filled, of.scores, how.block, how.statistic, how.aggregation
            )


def _stored(layer: BufferedLayer, rows: int, value_size: int) -> tuple[Tensor, Tensor]:
    """Keys and values of all slots; of latents both are one buffer."""
    keys, values = layer.keys, layer.values
    assert keys is not None
    assert values is not None
    if layer.latents is not None:
        keys = layer.latents
        values = keys[..., :value_size]
    return (keys, values) if rows == keys.shape[0] else (keys[:rows], values[:rows])
