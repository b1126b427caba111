"""One layer's buffers, of a size of its own, whose slots can be given up.

Order does not matter in a cache that knows positions: while decoding, what stays in the last slots moves into the slots
that were given up, and nothing else moves.
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
        batch: rows B.
        window: sliding window; such a layer gives nothing up.
        device: where it is.

    Attributes:
        from_all: float32 `[B, S]`: attention that each slot's token received from all tokens of the prompts.
        from_last: float32 `[B, S]`: the same from the last tokens of each prompt.
        pinned: bool `[B, S]`: tokens that the caller asked to keep.
        anchor: int32 `[B, 1]`: while decoding, positions below it stay.
    """

    keeps_places = False
    from_all: Tensor
    from_last: Tensor
    pinned: Tensor
    anchor: Tensor

    def __init__(self, batch: int, window: int, device: torch.device) -> None:
        super().__init__(Slots(batch, 0, device), window)

    def storage(self) -> list[Tensor]:
        """What is kept, each `[B, G, S, ...]`."""
        assert self.keys is not None
        assert self.values is not None
        return [self.keys, self.values]

    def encode(self, keys: Tensor, values: Tensor) -> Sequence[Tensor]:
        """Keys `[B, G, T, K]` and values in the form of :meth:`storage`."""
        return keys, values

    def decode(self, stored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The reverse of :meth:`encode`."""
        return stored[0], stored[1]

    @staticmethod
    def bytes_of(features: int, element_size: int) -> float:
        """Bytes that `features` numbers of one head take, of keys or of values."""
        return features * element_size

    def fit(self, capacity: int, keys: Tensor, values: Tensor) -> bool:
        """Make the buffers `capacity` slots long, unless they are so or a little longer.

        Args:
            capacity: slots.
            keys, values: of the right heads, sizes and dtype.

        Returns:
            Whether they are others than before.
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
        """What is known of each slot beside its position, each `[B, S]`."""
        return self.from_all, self.from_last, self.pinned

    def put(self, row: int, keys: Tensor, values: Tensor, positions: Tensor, tables: Sequence[Tensor]) -> None:
        """Fill the slots of the rows from `row` on; all arguments are of these rows, and of T slots."""
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
        """Keys and values of the slots in use."""
        return self.decode([stored[:rows, :, : self.slots.length] for stored in self.storage()])

    def give_up(self, target: Tensor, length: int, most: int, latest: Tensor, sink: int, recent: int) -> None:
        """Drop tokens until each row holds `target`; the host knows all sizes.

        The oldest go, apart from the first, the pinned, those below the anchor, and the last.

        Args:
            target: int64 `[B, 1]`.
            length: the largest of them: slots in use afterwards.
            most: how many slots the shortest row gives up.
            latest: int32 `[B, 1]`: position of each row's last token.
            sink: positions below it stay.
            recent: so many of the last positions stay.
        """
        slots, before = self.slots, self.slots.length
        positions = slots.positions[:, :before]
        stays = (positions < self.anchor) | (positions < sink) | (positions > latest - recent)
        stays |= self.pinned[:, :before]
        # Empty slots first, then the oldest; what must stay comes last.
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
