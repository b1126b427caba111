"""Sharing a step's samples out over ranks and micro-steps: longest processing time first, into levels.

Each of M micro-steps has one micro-batch on each of R ranks, and takes as long as the slowest of them. So the sum of

    T_j = max(c_{jR}, τ),  with τ such that  R Σ_j T_j = Σ costs

is where the fillings of the micro-steps should end: level, but for micro-steps that a single sample (c_0 ≥ c_1 ≥ …)
already takes above the level; on the other ranks they are filled up as far. Samples go, dearest first, to the
micro-batch with the most room below its level that has room in memory. Then the micro-batches are put together anew,
the R dearest in one micro-step and so on, and those of a micro-step dealt to ranks so that the ranks' sums stay alike.

Where this stays above what the sum of all costs allows, other levels are tried, and the fastest step is taken: all
alike, which suits samples of two sizes, and the first half of the micro-steps higher, which suits a few long ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Shares", "share"]

#: `[R][M]` lists of samples.
Shares = list[list[list[int]]]
Floats = NDArray[np.float64]

# A step that is so close to the mean of all ranks is taken at once.
_NEAR = 1.02
# How much above the average the first half of the micro-steps is tried at.
_STEEP = 1.35


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
    best: tuple[float, Shares] | None = None
    for levels in _tried(np.sort(cost)[::-1], ranks, micro_steps):
        held = _fill(cost, size, np.repeat(levels, ranks), max_tokens)
        if held is None:
            continue
        taken, found = _dealt(held, cost, ranks)
        if best is None or taken < best[0]:
            best = taken, found
        if taken <= _NEAR * cost.sum() / ranks:
            break
    if best is not None:
        return best[1]
    # Too tight for the costs: go by what is tight.
    held = _fill(size.astype(float), size, np.full(bins, float(max_tokens)), max_tokens)
    return None if held is None else _dealt(held, cost, ranks)[1]


def _tried(costs: Floats, ranks: int, micro_steps: int) -> Iterator[Floats]:
    """Levels of the micro-steps; `costs` fall."""
    levels = _levels(costs, ranks, micro_steps)
    yield levels
    if micro_steps == 1 or len(costs) == ranks * micro_steps:
        return
    average = costs.sum() / (ranks * micro_steps)
    yield np.full(micro_steps, average)
    half = micro_steps // 2
    high = np.maximum(levels[:half], _STEEP * average)
    rest = (average * micro_steps - high.sum()) / (micro_steps - half)
    if rest > 0:
        yield np.concatenate([high, np.full(micro_steps - half, rest)])


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


def _dealt(held: list[list[int]], cost: Floats, ranks: int) -> tuple[float, Shares]:
    """Like goes with like; the dearest micro-batch of each micro-step goes to the rank that has least so far.

    Returns:
        Cost of the step, and the shares.
    """
    found: Shares = [[] for _ in range(ranks)]
    sums = [0.0] * ranks
    totals = [float(cost[samples].sum()) for samples in held]
    order = sorted(range(len(held)), key=lambda n: -totals[n])
    for first in range(0, len(held), ranks):
        step = order[first : first + ranks]
        for rank, number in zip(sorted(range(ranks), key=lambda r: sums[r]), step, strict=True):
            found[rank].append(sorted(held[number]))
            sums[rank] += totals[number]
    return sum(totals[n] for n in order[::ranks]), found
