"""The KV cache of speculative decoding: a cache of the decode engine with slots for a token tree after the prefix.

    slots   0 ... lengths[b]   prefix: the tokens of sequence b, whose number differs between sequences
            base ... base + N  nodes of the tree, in the same slots for every sequence and round

A call on nodes writes their keys and values from slot `base` on, and attends to the prefix and the ancestors of each
node. Accepted nodes are then moved to the end of each sequence's prefix (:meth:`TreeCache.commit`). All sizes are
fixed, and a round changes only numbers in device buffers, so that the host never has to wait for the device.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import effpass.lowering.ops.tree_acceptance
import effpass.lowering.ops.tree_attention  # noqa: F401  (registers the operators)
from effpass.core.errors import EffpassError, ModelError
from effpass.lowering.ops.ancestors import WORD
from effpass.lowering.ops.tree_blocks import PARTS, block_means, most_blocks
from effpass.runtime.cache import BufferedLayer, DecodeCache, Reader, Slots, new_layers
from effpass.runtime.speculative.sparse import SharedBlocks

__all__ = ["TreeCache"]


class _TreeLayer(BufferedLayer):
    """Buffers of one layer, as a slice of a tensor for several layers; nodes are written to the slots of the tree."""

    cache: TreeCache
    means: Tensor | None = None  # [B, G, N, K], mean key of each block of the prefix

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values, self.latents, self.means = self.cache.place(self, key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.cache.has_tree:
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None
        assert self.values is not None
        torch.ops.effpass.cache_write(self.keys, self.values, key_states, value_states, self.cache.start)
        return self.keys, self.values


class _TreeReader(Reader):
    """Attention over a prefix and the ancestors in a tree."""

    def attend(
        self, cache: DecodeCache, index: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float
    ) -> Tensor | None:
        assert isinstance(cache, TreeCache)
        if not cache.has_tree:
            return None
        return torch.ops.effpass.tree_attention(
            query, keys, values, cache.slots.positions, cache.query_positions, cache.lengths, cache.ancestors,
            cache.base, scale, cache.buffers(index).window, softcap, *cache.chosen(index, query),
        )  # fmt: skip

    def ready(self, cache: DecodeCache) -> Hashable:
        return None

    def forget(self) -> None:
        """Do nothing, as no state is derived from the slots."""


@dataclass
class _Stack:
    """Keys `[L, B, G, S, K]` and values `[L, B, G, S, V]` of layers of equal sizes, or views of their latents."""

    keys: Tensor
    values: Tensor
    latents: Tensor | None = None
    means: Tensor | None = None  # [L, B, G, N, K], mean key of each block
    used: int = 0


class TreeCache(DecodeCache):
    """A cache for `batch` sequences of up to `capacity` tokens, each followed by a tree of up to `nodes` nodes.

    Args:
        config: config of the model.
        batch: number of sequences B that the buffers hold.
        capacity: number of slots of the prefix.
        nodes: number of slots of the tree.
        device: device of the buffers.
        blocks: choice of the blocks of the prefix that sparse calls attend to; None for all blocks.

    Attributes:
        base: first slot of the tree, which is `capacity`.
        nodes: number of slots of the tree.
        words: number of 64-bit words W of an ancestor mask (:mod:`effpass.lowering.ops.ancestors`).
        lengths: int32 `[B]` on the device, number of slots in each sequence's prefix.
        has_tree: whether calls are on nodes of a tree, instead of on a prompt.
        start: int32 `[1]` on the device, first slot that the current call writes.
        ancestors: int64 `[B, T, W]`, ancestor masks of the current call's nodes.
        is_sparse: whether the current call attends to chosen blocks of the prefix only.
    """

    is_sparse = False

    def __init__(
        self, config: Any, batch: int, capacity: int, nodes: int, device: torch.device,
        blocks: SharedBlocks | None = None,
    ) -> None:  # fmt: skip
        slots = Slots(batch, capacity + nodes, device)
        layers = new_layers(config, slots, lambda window: _TreeLayer(slots, window))
        if states := [str(index) for index, layer in enumerate(layers) if not layer.keeps_keys]:
            raise ModelError(
                f"layers {', '.join(states)} are linear attention: they keep a state, and no keys that could be taken"
                " back",
                hint="generate without a draft",
            )
        super().__init__(config, batch, capacity, device, layers)
        for layer in layers:
            assert isinstance(layer, _TreeLayer)
            layer.cache = self
        self.base, self.nodes, self.words = capacity, nodes, -(-nodes // WORD)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.has_tree = False
        # Each call in a recorded graph reads an element of its own, so that none is overwritten between calls.
        self._starts = torch.arange(capacity, capacity + nodes, dtype=torch.int32, device=device)[:, None]
        self.start = self._starts[0]
        self.ancestors = torch.zeros(batch, 1, self.words, dtype=torch.long, device=device)
        self.reader = _TreeReader()
        self._blocks = blocks
        self._chosen: Tensor | None = None  # blocks of the current call, by the last layer that chose
        self._stacks: list[_Stack] = []

    def place(
        self, layer: BufferedLayer, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return buffers of a layer for keys, values, latents and block means, given its first keys and values."""
        batch, slots = self.slots.positions.shape
        groups, sizes = keys.shape[1], [keys.shape[3], values.shape[3]]
        for stack in self._stacks:
            alike = (stack.keys.shape[2], stack.keys.shape[4], stack.values.shape[4], stack.keys.dtype)
            if alike == (groups, *sizes, keys.dtype) and stack.used < len(stack.keys):
                break
        else:
            count = sum(
                not other.is_initialized and other.is_sliding == layer.is_sliding
                for other in map(self.buffers, range(len(self.layers)))
            )
            # Zeros, because a masked slot has weight 0, and 0 times uninitialized memory may be NaN.
            shape = (count, batch, groups, slots)
            if groups == 1 and sizes[0] != sizes[1]:  # latents (MLA): both parts together are one key
                whole = keys.new_zeros(*shape, sum(sizes))
                stack = _Stack(whole[..., : sizes[0]], whole[..., sizes[0] :], whole)
            else:
                stack = _Stack(keys.new_zeros(*shape, sizes[0]), values.new_zeros(*shape, sizes[1]))
            if self._blocks is not None:
                stack.means = keys.new_zeros(*shape[:3], -(-self.base // self._blocks.block), sizes[0])
            self._stacks.append(stack)
        index, stack.used = stack.used, stack.used + 1
        latents, means = (None if x is None else x[index] for x in (stack.latents, stack.means))
        return stack.keys[index], stack.values[index], latents, means

    @property
    def takes_padding(self) -> bool:
        return not self.has_tree and self._are_plain(_TreeLayer)

    def begin_tree(self) -> None:
        """Switch from prompts to trees; the prefix of every sequence consists of the slots that the prompts filled."""
        self.lengths.fill_(self.slots.length)
        self.has_tree = True
        for stack in self._stacks:
            for layer in range(stack.used):  # one at a time, as temporary tensors of a long prompt are large
                self._bring_up(stack, slice(layer, layer + 1), self.slots.length)

    def reset(self) -> None:
        super().reset()
        self.lengths.zero_()
        self.has_tree = False

    def enter(self, positions: Tensor, ancestors: Tensor, first: int) -> None:
        """Prepare a call on nodes.

        Args:
            positions: int32 `[B, T]`, positions of the nodes' tokens; -1 for padding.
            ancestors: int64 `[B, T, W]`, mask of each node's ancestors, including itself, over the slots of the tree.
            first: slot of the tree for the first of the nodes.

        Raises:
            EffpassError: if the tree has too few slots.
        """
        count = positions.shape[1]
        if first + count > self.nodes:
            raise EffpassError(
                f"a tree of {first + count} nodes has no room in a cache for {self.nodes}",
                hint="make the session with more nodes, or the tree smaller",
            )
        self.start, self.ancestors, self.query_positions = self._starts[first], ancestors, positions
        self.slots.positions[:, self.base + first : self.base + first + count] = positions

    def commit(self, path: Tensor, taken: Tensor) -> None:
        """Move nodes to the end of each sequence's prefix.

        Args:
            path: int64 `[B, J]`, slots of the nodes in the tree, from the root down.
            taken: int64 `[B]`, number of nodes to move; the caller ensures that the prefix has room for them.
        """
        for stack in self._stacks:
            torch.ops.effpass.move_slots(
                stack.keys, stack.values, self.slots.positions, self.lengths, path, taken, self.base,
                stack is self._stacks[-1],
            )  # fmt: skip
        for stack in self._stacks:
            self._bring_up(stack, slice(stack.used), path.shape[1])

    # -- sparse calls -------------------------------------------------------------------------------------------------

    @contextmanager
    def sparse(self) -> Iterator[None]:
        """Context in which a call attends to the blocks that the query of its first node, the root, chooses."""
        self.is_sparse = self._blocks is not None
        try:
            yield
        finally:
            self.is_sparse, self._chosen = False, None

    def chosen(self, index: int, query: Tensor) -> tuple[Tensor | None, int]:
        """Return the blocks of the prefix that a layer attends to, int32 `[B, G, M]`, and the slots per block.

        Args:
            index: index of the layer.
            query: `[B, H, T, K]`, queries of the call.

        Returns:
            None and 0 if the layer attends to the whole prefix.
        """
        how, means = self._blocks, self.buffers(index).means  # type: ignore[attr-defined]
        if not self.is_sparse or how is None or self.buffers(index).window:
            return None, 0
        if self._chosen is None or how.anchors is None or index in how.anchors:
            share = round(how.share * PARTS)
            most = most_blocks(self.base, how.block, how.dense_below, share)
            self._chosen = torch.ops.effpass.choose_tree_blocks(
                query[:, :, 0], means, self.lengths, most, how.block, how.dense_below, share
            )
        return self._chosen, how.block

    def _bring_up(self, stack: _Stack, layers: slice, width: int) -> None:
        """Update the mean keys of the blocks that hold the last `width` tokens, if sparse calls need them."""
        if stack.means is not None and width:
            assert self._blocks is not None
            block_means(
                stack.keys[layers], self.slots.positions, self.lengths, stack.means[layers], self._blocks.block, width
            )
