"""The buffers of one layer, with a capacity of their own and slots that can be evicted.

As the cache stores the position of each slot's token, the order of slots does not matter: an eviction while decoding
moves the remaining tokens of the last slots into the slots that became free, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effpass.runtime.cache import BufferedLayer, Slots

__all__ = ["EvictingLayer"]


class EvictingLayer(BufferedLayer):
    """Keys `[B, G, S, K]` and values `[B, G, S, V]`, with S chosen after the prompt.

    Args:
        batch: number of sequences B that the buffers hold.
        window: size of the sliding window in positions, in which case nothing is evicted; 0 for full attention.
        device: device of the buffers.

    Attributes:
        from_all: float32 `[B, S]`, attention that each slot's token received from all tokens of the prompts.
        from_last: float32 `[B, S]`, attention that it received from the last tokens of each prompt.
        pinned: bool `[B, S]`, tokens that the caller asked to keep.
        anchor: int32 `[B, 1]`, position below which no token is evicted while decoding.
    """

    keeps_places = False
    from_all: Tensor
    from_last: Tensor
    pinned: Tensor
    anchor: Tensor

    def __init__(self, batch: int, window: int, device: torch.device) -> None:
        super().__init__(Slots(batch, 0, device), window)

    def storage(self) -> list[Tensor]:
        """Return the tensors that the slots are stored in, each `[B, G, S, ...]`."""
        assert self.keys is not None
        assert self.values is not None
        return [self.keys, self.values]

    def encode(self, keys: Tensor, values: Tensor) -> Sequence[Tensor]:
        """Convert keys `[B, G, T, K]` and values `[B, G, T, V]` to the form of :meth:`storage`."""
        return keys, values

    def decode(self, stored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Convert stored tensors back to keys and values; the inverse of :meth:`encode`."""
        return stored[0], stored[1]

    @staticmethod
    def bytes_of(features: int, element_size: int) -> float:
        """Return the bytes that `features` numbers of one head take in the cache, for keys or values."""
        return features * element_size

    def fit(self, capacity: int, keys: Tensor, values: Tensor) -> bool:
        """Allocate buffers of `capacity` slots, unless the present ones have that size or are slightly larger.

        Args:
            capacity: number of slots.
            keys, values: tensors with the number of heads, head sizes and dtype of the buffers.

        Returns:
            Whether new buffers were allocated.
        """
        batch, slots = self.slots.positions.shape
        if self.is_initialized and capacity <= slots <= capacity + capacity // 4 + 256:
            return False
        device = self.slots.positions.device
        self.slots, self.keys, self.values, self.latents = Slots(batch, capacity, device), None, None, None
        self.lazy_initialization(keys, values)
        self.from_all, self.from_last = torch.zeros(2, batch, capacity, device=device)
        self.pinned = torch.zeros(batch, capacity, dtype=torch.bool, device=device)
        self.anchor = torch.zeros(batch, 1, dtype=torch.int32, device=device)
        return True

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the data of the slots besides positions: `from_all`, `from_last` and `pinned`, each `[B, S]`."""
        return self.from_all, self.from_last, self.pinned

    def put(self, row: int, keys: Tensor, values: Tensor, positions: Tensor, tables: Sequence[Tensor]) -> None:
        """Fill the first T slots of the sequences from `row` on, which the other arguments belong to."""
        rows, count = positions.shape
        here = slice(row, row + rows)
        for stored, new in zip(self.storage(), self.encode(keys, values), strict=True):
            stored[here, :, :count] = new
        slots = self.slots
        slots.positions[here, :count] = positions
        slots.positions[here, count:] = -1
        slots.filled.fill_(count)
        slots.length = count
        for table, of_rows in zip(self.tables(), tables, strict=True):
            table[here, :count] = of_rows

    def get(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the slots in use, of the first `rows` sequences."""
        return self.decode([stored[:rows, :, : self.slots.length] for stored in self.storage()])

    def give_up(self, target: Tensor, length: int, most: int, latest: Tensor, sink: int, recent: int) -> None:
        """Evict tokens until each sequence holds `target`; all sizes are known on the host, without synchronization.

        The oldest tokens are evicted, except the first ones, the last ones, pinned ones and those below the anchor.

        Args:
            target: int64 `[B, 1]`, number of slots in use of each sequence afterwards.
            length: maximum of `target`, number of slots in use of the layer afterwards.
            most: maximum over sequences of the number of slots to empty.
            latest: int32 `[B, 1]`, position of the last token of each sequence.
            sink: number of first positions to keep.
            recent: number of last positions to keep.
        """
        slots, before = self.slots, self.slots.length
        positions = slots.positions[:, :before]
        stays = (positions < self.anchor) | (positions < sink) | (positions > latest - recent)
        stays |= self.pinned[:, :before]
        # Empty slots come first, then the oldest tokens; protected tokens come last.
        key = positions + (stays & (positions >= 0)).int() * (1 << 30)
        candidates = key.topk(most, dim=1, largest=False, sorted=True).indices
        place = torch.arange(most, device=key.device)
        dropped = torch.zeros_like(stays).scatter_(1, candidates, place < before - target)
        positions.masked_fill_(dropped, -1)

        moving = positions[:, length:] >= 0
        holes = (positions[:, :length] < 0).int().topk(min(before - length, length), dim=1).indices
        rank = (moving.cumsum(1) - 1).clamp(min=0, max=holes.shape[1] - 1)
        own = torch.arange(length, before, device=key.device).expand_as(rank)
        goes_to = torch.where(moving, holes.gather(1, rank), own)
        for stored in self.storage():
            last = stored[:, :, length:before].clone()
            stored.scatter_(2, goes_to[:, None, :, None].expand_as(last), last)
        for table in (slots.positions, *self.tables()):
            table.scatter_(1, goes_to, table[:, length:before].clone())
        slots.positions[:, length:before] = -1
        slots.filled.fill_(length)
        slots.length = length
        slots.is_dense = False
