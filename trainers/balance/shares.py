"""Sharing a step's samples out over ranks and micro-steps: longest processing time first, into levels.

Each of M micro-steps has one micro-batch on each of R ranks, and takes as long as the slowest of them. So the sum of

    T_j = max(c_{jR}, τ),  with τ such that  R Σ_j T_j = Σ costs

is where the fillings of the micro-steps should end: level, but for micro-steps that a single sample (c_0 ≥ c_1 ≥ …)
already takes above the level; on the other ranks they are filled up as far. Samples go, dearest first, to the
micro-batch with the most room below its level that has room in memory. Last, the micro-batches of a micro-step are
dealt to ranks so that the ranks' sums stay alike.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Shares", "share"]

#: `[R][M]` lists of samples.
Shares = list[list[list[int]]]
Floats = NDArray[np.float64]


def share(costs: ArrayLike, tokens: Sequence[int], ranks: int, micro_steps: int, max_tokens: int) -> Shares | None:
    """Micro-batches of a step.

    Args:
        costs: of each sample, in seconds.
        tokens: of each sample.
        ranks: R.
        micro_steps: M.
        max_tokens: that a micro-batch may hold.

    Returns:
        For each rank and micro-step the samples, each in one of them, none without any; None where they do not fit.
    """
    cost, size = np.asarray(costs, float), np.asarray(tokens)
    bins = ranks * micro_steps
    if len(cost) < bins or size.max() > max_tokens or size.sum() > bins * max_tokens:
        return None
    found = _fill(cost, size, np.repeat(_levels(np.sort(cost)[::-1], ranks, micro_steps), ranks), max_tokens)
    if found is None:  # too tight for the costs: go by what is tight
        found = _fill(size.astype(float), size, np.full(bins, float(max_tokens)), max_tokens)
    return None if found is None else _dealt(found, cost, ranks)


def _levels(costs: Floats, ranks: int, micro_steps: int) -> Floats:
    """T of each micro-step, falling; `costs` fall."""
    highest = costs[: ranks * micro_steps : ranks]
    average = costs.sum() / ranks
    for above in range(micro_steps):
        level = (average - highest[:above].sum()) / (micro_steps - above)
        if highest[above] <= level:
            return np.concatenate([highest[:above], np.full(micro_steps - above, level)])
    return highest.copy()


def _fill(cost: Floats, size: NDArray[np.int64], levels: Floats, max_tokens: int) -> list[list[int]] | None:
    """Samples of each micro-batch."""
    held: list[list[int]] = [[] for _ in levels]
    left = [max_tokens] * len(levels)
    order = np.argsort(-cost, kind="stable").tolist()
    costs, sizes = cost.tolist(), size.tolist()
    smallest = np.minimum.accumulate(size[order][::-1])[::-1].tolist()  # of the samples still to come
    room = [(-level, number) for number, level in enumerate(levels.tolist())]
    heapq.heapify(room)
    empty = len(levels)
    for turn, sample in enumerate(order):
        must_open = len(order) - turn == empty  # one sample for each that has none
        passed = []
        place = None
        while room:
            entry = heapq.heappop(room)
            number = entry[1]
            if must_open and held[number]:
                continue  # from here on each sample opens one
            if left[number] >= sizes[sample]:
                place = entry
                break
            if left[number] >= smallest[turn]:
                passed.append(entry)
        for entry in passed:
            heapq.heappush(room, entry)
        if place is None:
            return None
        number = place[1]
        empty -= not held[number]
        held[number].append(sample)
        left[number] -= sizes[sample]
        heapq.heappush(room, (place[0] + costs[sample], number))
    return held


def _dealt(held: list[list[int]], cost: Floats, ranks: int) -> Shares:
    """The dearest micro-batch of each micro-step goes to the rank that has least so far."""
    found: Shares = [[] for _ in range(ranks)]
    sums = [0.0] * ranks
    totals = [float(cost[samples].sum()) for samples in held]
    for first in range(0, len(held), ranks):
        step = sorted(range(first, first + ranks), key=lambda n: -totals[n])
        for rank, number in zip(sorted(range(ranks), key=lambda r: sums[r]), step, strict=True):
            found[rank].append(sorted(held[number]))
            sums[rank] += totals[number]
    return found
