"""Selection of the tokens that a layer keeps.

The session orders a layer's slots by :func:`priority` and keeps the first ones (:func:`kept_slots`). The share of
attention that each number of kept slots retains (:func:`cumulative_mass`) is the input of the threshold search.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cumulative_mass", "kept_slots", "priority"]


def priority(rank: Tensor, positions: Tensor, pinned: Tensor, sink: int, recent: int) -> Tensor:
    """Return the slots in the order in which they are kept, int64 `[B, S]`.

    Protected slots come first, then the others by descending `rank`, and empty slots last.

    Args:
        rank: float32 `[B, S]`, scores of the slots.
        positions: int32 `[B, S]`, token positions; -1 in empty slots.
        pinned: bool `[B, S]`, tokens that the caller protects.
        sink: number of first positions that are protected.
        recent: number of last positions of each sequence that are protected.
    """
    latest = positions.amax(1, keepdim=True)
    protected = (positions < sink) | (positions > latest - recent) | pinned
    key = rank.masked_fill(protected, float("inf")).masked_fill(positions < 0, float("-inf"))
    return key.argsort(dim=1, descending=True, stable=True)


def cumulative_mass(rank: Tensor, positions: Tensor, order: Tensor, sink: int) -> Tensor:
    """Return C(1) ... C(S), the share of all scores in the first K slots of `order`: float64 `[B, S]`, the last one 1.

    The first tokens count as zero. They draw attention whatever the text is (https://arxiv.org/abs/2309.17453), and are
    always kept. If they counted, a layer with most of its attention on them would seem to need hardly any other token.

    Args:
        rank: float32 `[B, S]`, scores of the slots.
        positions: int32 `[B, S]`, token positions; -1 in empty slots.
        order: int64 `[B, S]`, slots in the order of :func:`priority`.
        sink: number of first positions that count as zero.
    """
    mass = rank.double().masked_fill(positions < sink, 0).gather(1, order).cumsum(1)
    return (mass / mass[:, -1:].clamp(min=1e-30)).clamp(max=1).masked_fill(mass >= mass[:, -1:], 1)


def kept_slots(order: Tensor, positions: Tensor, count: int, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first slots of `order`, sorted by their positions.

    Args:
        order: int64 `[B, S]`, slots in the order of :func:`priority`.
        positions: int32 `[B, S]`, token positions; -1 in empty slots.
        count: number of slots K ≤ S to return.
        counts: int64 `[B, 1]`, number of slots that each sequence keeps; the others become empty.

    Returns:
        Slots int64 `[B, K]` and their positions int32 `[B, K]`; empty slots have position -1 and come last.
    """
    slots = order[:, :count]
    found = positions.gather(1, slots)
    found = found.masked_fill(torch.arange(count, device=found.device) >= counts, -1)
    place = torch.where(found < 0, torch.iinfo(torch.int32).max, found).argsort(dim=1, stable=True)
    return slots.gather(1, place), found.gather(1, place)
