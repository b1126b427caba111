"""Which tokens of a layer stay."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cumulative_mass", "kept_slots", "priority"]


def priority(rank: Tensor, positions: Tensor, pinned: Tensor, sink: int, recent: int) -> Tensor:
    """Slots in the order in which they are kept: the protected first, then by rank; empty ones last. int64 `[B, S]`.

    Args:
        rank: float32 `[B, S]`, larger is earlier.
        positions: int32 `[B, S]`; -1 in empty slots.
        pinned: bool `[B, S]`: protected.
        sink: positions below it are protected.
        recent: so many of each row's last positions are protected.
    """
    latest = positions.amax(1, keepdim=True)
    protected = (positions < sink) | (positions > latest - recent) | pinned
    key = rank.masked_fill(protected, float("inf")).masked_fill(positions < 0, float("-inf"))
    return key.argsort(dim=1, descending=True, stable=True)


def cumulative_mass(rank: Tensor, positions: Tensor, order: Tensor, sink: int) -> Tensor:
    """C(1) ... C(S): the share of all importance in the first K slots of `order`. float64 `[B, S]`, the last one 1.

    The first tokens count nothing. They draw attention whatever the text is (https://arxiv.org/abs/2309.17453), and are
    kept anyway: a layer that spends most of its attention on them would seem to need hardly anything else.

    Args:
        rank: float32 `[B, S]`.
        positions: int32 `[B, S]`; -1 in empty slots.
        order: int64 `[B, S]`.
        sink: positions below it count nothing.
    """
    mass = rank.double().masked_fill(positions < sink, 0).gather(1, order).cumsum(1)
    return (mass / mass[:, -1:].clamp(min=1e-30)).clamp(max=1).masked_fill(mass >= mass[:, -1:], 1)


def kept_slots(order: Tensor, positions: Tensor, count: int, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The first slots of `order`, in the order of their positions.

    Args:
        order: int64 `[B, S]`.
        positions: int32 `[B, S]`.
        count: slots to return, K ≤ S.
        counts: int64 `[B, 1]`: how many of them each row keeps; the rest are empty.

    Returns:
        Slots int64 `[B, K]`, and their positions int32 `[B, K]`, -1 in those that are empty, which come last.
    """
    slots = order[:, :count]
    found = positions.gather(1, slots)
    found = found.masked_fill(torch.arange(count, device=found.device) >= counts, -1)
    place = torch.where(found < 0, torch.iinfo(torch.int32).max, found).argsort(dim=1, stable=True)
    return slots.gather(1, place), found.gather(1, place)
