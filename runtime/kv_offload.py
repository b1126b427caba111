"""The decode engine's cache with its keys and values in host memory.

A layer's keys and values are tensors of the device as ever, whose memory is the host's: everything that reads or writes
a cache works on them, through the bus. What is done at every step, or with a whole prompt, has ways of its own:

* a step writes its token to the host and to the page of its block, and attends through the pages
  (:mod:`effpass.lowering.ops.block_pool`, :mod:`effpass.runtime.sparse_attention`);
* a prompt attends to its own keys where they were computed, and they are copied to the host meanwhile; a prompt that
  is run in pieces, or follows an earlier one, has what stands before it copied into a buffer that all layers share.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effpass.lowering.ops.block_pool import COUNTED, BlockPool, join, side_stream
from effpass.runtime.cache import BufferedLayer, DecodeCache, Slots, new_layers
from effpass.runtime.host_memory import HostMemory, Slab
from effpass.runtime.prefix_kv.layer import EvictingLayer
from effpass.runtime.prefix_kv.plan import token_bytes

__all__ = ["Offload", "OffloadCounters", "OffloadedCache", "OffloadedEvictingLayer", "OffloadedLayer"]


@dataclass(frozen=True)
class OffloadCounters:
    """What decode steps did, summed over layers, sequences and key-value heads.

    Attributes:
        blocks: blocks that hold a key which a step attended to.
        missing_blocks: those of them that had no page.
        tokens: keys that steps attended to.
        missing_tokens: those of them that attention read through the bus.
        copied: blocks that were copied beside computation.
        read_bytes: bytes of `missing_tokens`.
        copied_bytes: bytes of `copied`.
        waited: seconds that steps waited at their end for copies; 0 on a CPU.
    """

    blocks: int
    missing_blocks: int
    tokens: int
    missing_tokens: int
    copied: int
    read_bytes: int
    copied_bytes: int
    waited: float

    @property
    def hit_rate(self) -> float:
        """Share of the blocks that had a page; NaN before the first step."""
        return 1 - self.missing_blocks / self.blocks if self.blocks else float("nan")

    @property
    def token_hit_rate(self) -> float:
        """Share of the keys that did not come through the bus; NaN before the first step."""
        return 1 - self.missing_tokens / self.tokens if self.tokens else float("nan")


@dataclass(eq=False)
class Offload:
    """Where the caches of one model keep their keys and values, and what is on the device of them.

    Attributes:
        memory: the host's.
        block: slots of a block.
        most: blocks of a head that a step chooses, at most.
        pages: blocks of a head that the device holds.
        copies: blocks of a head that a step may have copied for later ones.
        caches: those that are in use.
    """

    memory: HostMemory
    block: int
    most: int
    pages: int
    copies: int
    caches: weakref.WeakSet[OffloadedCache] = field(default_factory=weakref.WeakSet)

    def __deepcopy__(self, memo: Any) -> Offload:
        return Offload(self.memory, self.block, self.most, self.pages, self.copies)  # a copy of the model has its own

    def cache(self, model: Any, batch: int, capacity: int) -> OffloadedCache:
        """A cache for `batch` sequences of `capacity` tokens.

        Raises:
            HostMemoryError: there is no room for it; nothing was taken.
        """
        plain, transfers = DecodeCache(model.config, batch, capacity, model.device), Transfers()
        layers: list[BufferedLayer] = [
            OffloadedLayer(layer.slots, self, transfers) if _is_full(layer) else layer
            for layer in map(plain.buffers, range(len(plain)))
        ]
        blocks = -(-capacity // self.block)
        of_token = token_bytes(model.config, model.dtype.itemsize, lambda size, element: size * element)
        count = sum(isinstance(layer, OffloadedLayer) for layer in layers)
        self.memory.check(int(batch * blocks * self.block * of_token) * count)
        return OffloadedCache(model, batch, capacity, layers, self, transfers)

    def evicting(self, model: Any, batch: int, capacity: int) -> OffloadedCache:
        """A cache whose layers are as large as their share of a budget, which is known after the prompt."""
        device, transfers = model.device, Transfers()

        def layer(window: int) -> BufferedLayer:
            return EvictingLayer(batch, window, device) if window else OffloadedEvictingLayer(batch, device, self)

        layers = new_layers(model.config, Slots(batch, 0, device), layer)
        return OffloadedCache(model, batch, capacity, layers, self, transfers)

    def counters(self) -> OffloadCounters:
        """Of the caches in use, since they were made; waits for the device."""
        sums, read, copied, waited = [0] * len(COUNTED), 0, 0, 0.0
        for cache in self.caches:
            for pool in cache.pools():
                found = pool.counts.sum((0, 1)).tolist()
                sums = [a + b for a, b in zip(sums, found, strict=True)]
                of_block = pool.pages[:1].nbytes
                read += found[COUNTED.index("missing_tokens")] * of_block // self.block
                copied += found[COUNTED.index("copied")] * of_block
            waited += int(cache.times[2]) / 1e9
        return OffloadCounters(
            **dict(zip(COUNTED, sums, strict=True)), read_bytes=read, copied_bytes=copied, waited=waited
        )


def _is_full(layer: BufferedLayer) -> bool:
    """Whether it keeps every token's keys and values, and steps read all of them."""
    return type(layer) is BufferedLayer and not layer.window


class Transfers:
    """Copies a prompt's keys and values to the host and back, on a stream beside."""

    def __init__(self) -> None:
        self._staged: Tensor | None = None

    def store(self, slab: Slab, new: Tensor, first: int) -> None:
        """Copy `new` `[rows, G, T, W]` to the host, to the slots from `first` on."""
        rows, groups, tokens, _ = new.shape
        host = slab.tensor.flatten(2, 3)
        with self._beside(new.device):
            for row in range(rows):
                for group in range(groups):  # each is one copy of memory that hangs together
                    host[row, group, first : first + tokens].copy_(new[row, group], non_blocking=True)
        if new.is_cuda:
            new.record_stream(side_stream(new.device))

    def load(self, slab: Slab, rows: int, count: int, room: int) -> Tensor:
        """`[rows, G, room, W]` on the device, whose first `count` slots are those of the host."""
        host, device = slab.tensor.flatten(2, 3), slab.seen.device
        groups, width = host.shape[1], host.shape[3]
        shape = (rows, groups, room, width)
        if self._staged is None or self._staged.shape != shape or self._staged.dtype != host.dtype:
            self._staged = None  # before another one is made
            self._staged = torch.empty(shape, dtype=host.dtype, device=device)
        with self._beside(device):
            for row in range(rows):
                for group in range(groups):
                    self._staged[row, group, :count].copy_(host[row, group, :count], non_blocking=True)
        if device.type == "cuda":
            torch.cuda.current_stream(device).wait_stream(side_stream(device))
        return self._staged

    def finish(self, device: torch.device) -> None:
        """Wait for what was stored, on the device's stream."""
        if device.type == "cuda":
            torch.cuda.current_stream(device).wait_stream(side_stream(device))
        self._staged = None

    @staticmethod
    def _beside(device: torch.device) -> Any:
        if device.type != "cuda":
            return nullcontext()
        side = side_stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(side)


class _Offloaded(BufferedLayer):
    """Keys `[B, G, S, K]` and values `[B, G, S, V]` in host memory; `keys` and `values` see it from the device.

    Attributes:
        pool: which blocks of them are on the device.
    """

    slab: Slab
    _offload: Offload

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, capacity = self.slots.positions.shape
        groups, sizes = key_states.shape[1], [key_states.shape[3], value_states.shape[3]]
        of, device = self._offload, key_states.device
        blocks = -(-capacity // of.block)
        self.slab = of.memory.take((batch, groups, blocks, of.block, sum(sizes)), key_states.dtype, device)
        self.pool = BlockPool.empty(self.slab.seen, of.pages, of.most, of.copies)
        rows = self.slab.seen.flatten(2, 3)[:, :, :capacity]
        self.keys, self.values = rows.split(sizes, -1)
        self.latents = rows if groups == 1 and sizes[0] != sizes[1] else None
        self.dtype, self.device = key_states.dtype, device
        self.is_initialized = True

    def joined(self, key: Tensor, value: Tensor, tokens: int) -> Tensor:
        # What a prompt attends to is not in `latents`, or not yet.
        return super().joined(key, value, tokens) if tokens == 1 else torch.cat((key, value), -1)

    def _step(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        assert self.pool is not None
        assert self.keys is not None
        assert self.values is not None
        self.pool.write(key_states, value_states, self.slots.start)
        rows, reads = key_states.shape[0], self.slots.reads
        return self.keys[:rows, :, :reads], self.values[:rows, :, :reads]


class OffloadedLayer(_Offloaded):
    """A layer of a cache whose layers all hold every token."""

    def __init__(self, slots: Slots, offload: Offload, transfers: Transfers) -> None:
        super().__init__(slots, 0)
        self._offload = offload
        self._transfers = transfers

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[2] == 1:
            return self._step(key_states, value_states)
        assert self.pool is not None
        rows, tokens, key_size = key_states.shape[0], key_states.shape[2], key_states.shape[3]
        reads = self.slots.reads
        first = reads - tokens
        self.pool.forget(first // self._offload.block)
        new = torch.cat((key_states, value_states), -1)
        self._transfers.store(self.slab, new, first)
        if not first:
            return key_states, value_states
        whole = self._transfers.load(self.slab, rows, first, self.slots.positions.shape[1])[:, :, :reads]
        whole[:, :, first:] = new
        return whole[..., :key_size], whole[..., key_size:]


class OffloadedEvictingLayer(_Offloaded, EvictingLayer):
    """A layer with a budget; a prompt is staged on the device until the layer's tokens are chosen."""

    def __init__(self, batch: int, device: torch.device, offload: Offload) -> None:
        EvictingLayer.__init__(self, batch, 0, device)
        self._offload = offload

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._step(key_states, value_states)

    def put(self, row: int, keys: Tensor, values: Tensor, positions: Tensor, tables: Sequence[Tensor]) -> None:
        super().put(row, keys, values, positions, tables)
        assert self.pool is not None
        self.pool.forget()

    def give_up(self, *args: Any) -> None:
        super().give_up(*args)
        assert self.pool is not None
        self.pool.forget()


class OffloadedCache(DecodeCache):
    """A cache of which some layers are in host memory.

    Attributes:
        times: int64 `[3]`, see :func:`effpass.lowering.ops.block_pool.join`.
    """

    def __init__(
        self, model: Any, batch: int, capacity: int, layers: Sequence[BufferedLayer], offload: Offload,
        transfers: Transfers,
    ) -> None:  # fmt: skip
        super().__init__(model.config, batch, capacity, model.device, layers)
        self.times = torch.zeros(3, dtype=torch.int64, device=model.device)
        self._transfers = transfers
        offload.caches.add(self)

    def pools(self) -> list[BlockPool]:
        return [pool for layer in self.layers if (pool := getattr(layer, "pool", None)) is not None]

    def reset(self) -> None:
        super().reset()
        for pool in self.pools():
            pool.forget()

    def changed(self) -> None:
        self._transfers.finish(self.times.device)
        super().changed()

    def stepped(self) -> None:
        if self.times.is_cuda:
            join(self.times)

    def state(self) -> list[Tensor]:
        return [*super().state(), self.times, *(pool.counts for pool in self.pools())]
