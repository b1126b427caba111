"""The decode engine's KV cache with keys and values offloaded to host memory.

Keys and values of a layer are device tensors backed by mapped host memory, so all code that reads or writes a cache
works on them, over the bus. Two frequent accesses are optimized:

* A decode step writes its token to host memory and, if the token's block of slots has a *page* (a copy of the block on
  the device), to the page. It attends through the pages (:mod:`effpass.lowering.ops.block_pool`,
  :mod:`effpass.runtime.sparse_attention`).
* A prefill attends to its own keys where they were computed, on the device, while they are copied to host memory. If
  the prompt is run in chunks, or follows an earlier one, the preceding keys and values are copied back into a device
  buffer that all layers share.
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
    """Statistics of decode steps, summed over layers, sequences and KV heads.

    Attributes:
        blocks: number of blocks with a key that a step attended to.
        missing_blocks: number of these blocks without a page on the device.
        tokens: number of keys that steps attended to.
        missing_tokens: number of these keys that attention read over the bus.
        copied: number of blocks that were copied to the device in parallel with computation.
        read_bytes: size of `missing_tokens` in bytes.
        copied_bytes: size of `copied` in bytes.
        waited: time in seconds that steps waited for copies at their end; 0 on a CPU.
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
        """Fraction of the blocks that had a page; NaN before the first step."""
        return 1 - self.missing_blocks / self.blocks if self.blocks else float("nan")

    @property
    def token_hit_rate(self) -> float:
        """Fraction of the keys that were not read over the bus; NaN before the first step."""
        return 1 - self.missing_tokens / self.tokens if self.tokens else float("nan")


@dataclass(eq=False)
class Offload:
    """Offloading settings that the caches of one model share, and a factory of these caches.

    Attributes:
        memory: host memory allocator.
        block: number of slots per block.
        most: maximum number of blocks per KV head that a decode step chooses.
        pages: number of blocks per KV head that the device holds.
        copies: maximum number of blocks per KV head that a decode step copies to the device for later steps.
        caches: caches in use.
    """

    memory: HostMemory
    block: int
    most: int
    pages: int
    copies: int
    caches: weakref.WeakSet[OffloadedCache] = field(default_factory=weakref.WeakSet)

    def __deepcopy__(self, memo: Any) -> Offload:
        return Offload(self.memory, self.block, self.most, self.pages, self.copies)  # a model copy has its own caches

    def cache(self, model: Any, batch: int, capacity: int) -> OffloadedCache:
        """Create a cache for `batch` sequences of up to `capacity` tokens; only full-attention layers are offloaded.

        Raises:
            HostMemoryError: if there is not enough host memory; nothing is allocated then.
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
        """Create a cache whose layers are sized after the prompt, by their share of a token budget (prefix_kv)."""
        device, transfers = model.device, Transfers()

        def layer(window: int) -> BufferedLayer:
            return EvictingLayer(batch, window, device) if window else OffloadedEvictingLayer(batch, device, self)

        layers = new_layers(model.config, Slots(batch, 0, device), layer)
        return OffloadedCache(model, batch, capacity, layers, self, transfers)

    def counters(self) -> OffloadCounters:
        """Sum the statistics of the caches in use since their creation; synchronizes with the device."""
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
    """Whether `layer` caches the keys and values of all tokens, rather than a window or a state."""
    return type(layer) is BufferedLayer and not layer.window


class Transfers:
    """Copies a prompt's keys and values to host memory and back, on a side stream."""

    def __init__(self) -> None:
        self._staged: Tensor | None = None

    def store(self, slab: Slab, new: Tensor, first: int) -> None:
        """Copy `new` `[rows, G, T, W]` to host memory, into the slots from `first` on."""
        rows, groups, tokens, _ = new.shape
        host = slab.tensor.flatten(2, 3)
        with self._beside(new.device):
            for row in range(rows):
                for group in range(groups):  # each copy is contiguous
                    host[row, group, first : first + tokens].copy_(new[row, group], non_blocking=True)
        if new.is_cuda:
            new.record_stream(side_stream(new.device))

    def load(self, slab: Slab, rows: int, count: int, room: int) -> Tensor:
        """Return a device buffer `[rows, G, room, W]` with the first `count` slots copied from host memory."""
        host, device = slab.tensor.flatten(2, 3), slab.seen.device
        groups, width = host.shape[1], host.shape[3]
        shape = (rows, groups, room, width)
        if self._staged is None or self._staged.shape != shape or self._staged.dtype != host.dtype:
            self._staged = None  # free it before another one is created
            self._staged = torch.empty(shape, dtype=host.dtype, device=device)
        with self._beside(device):
            for row in range(rows):
                for group in range(groups):
                    self._staged[row, group, :count].copy_(host[row, group, :count], non_blocking=True)
        if device.type == "cuda":
            torch.cuda.current_stream(device).wait_stream(side_stream(device))
        return self._staged

    def finish(self, device: torch.device) -> None:
        """Make the current stream wait for all copies, and free the device buffer."""
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
    """Keys `[B, G, S, K]` and values `[B, G, S, V]` in host memory, which `keys` and `values` view from the device.

    Attributes:
        pool: pool of the blocks that are on the device.
        slab: the host memory, `[B, G, blocks, block, K + V]`.
    """

    slab: Slab
    _offload: Offload

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, capacity = self.slots.positions.shape
        groups, sizes = key_states.shape[1], [key_states.shape[3], value_states.shape[3]]
        offload, device = self._offload, key_states.device
        blocks = -(-capacity // offload.block)
        self.slab = offload.memory.take((batch, groups, blocks, offload.block, sum(sizes)), key_states.dtype, device)
        self.pool = BlockPool.empty(self.slab.seen, offload.pages, offload.most, offload.copies)
        rows = self.slab.seen.flatten(2, 3)[:, :, :capacity]
        self.keys, self.values = rows.split(sizes, -1)
        self.latents = rows if groups == 1 and sizes[0] != sizes[1] else None
        self.dtype, self.device = key_states.dtype, device
        self.is_initialized = True

    def joined(self, key: Tensor, value: Tensor, tokens: int) -> Tensor:
        # In a prefill `key` and `value` are not views of `latents`, whose copy may still be under way.
        is_step = tokens == 1 and not self.slots.in_prompt
        return super().joined(key, value, tokens) if is_step else torch.cat((key, value), -1)

    def _step(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        assert self.pool is not None
        assert self.keys is not None
        assert self.values is not None
        self.pool.write(key_states, value_states, self.slots.start)
        rows, reads = key_states.shape[0], self.slots.reads
        return self.keys[:rows, :, :reads], self.values[:rows, :, :reads]


class OffloadedLayer(_Offloaded):
    """An offloaded layer that holds all tokens."""

    def __init__(self, slots: Slots, offload: Offload, transfers: Transfers) -> None:
        super().__init__(slots, 0)
        self._offload = offload
        self._transfers = transfers

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[2] == 1 and not self.slots.in_prompt:
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
    """An offloaded layer with a token budget; a prompt is staged on the device until the tokens to keep are chosen."""

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
    """A cache with some layers in host memory.

    Attributes:
        times: int64 `[3]`, measured waiting times, see :func:`effpass.lowering.ops.block_pool.join`.
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
