"""Distribution of the samples of a step over ranks and micro-steps, such that all micro-batches take about equal time.

Each of the M micro-steps consists of one micro-batch on each of the R ranks, and takes as long as the slowest of them.
With the costs of the samples in descending order, c_0 ≥ c_1 ≥ …, the target level of micro-step j is

    T_j = max(c_{jR}, τ),  with τ such that  R Σ_j T_j = Σ costs

All levels are equal, except where a single sample exceeds τ; such a micro-step is filled up to the cost of that sample
on the other ranks. Samples are assigned in descending order of cost (longest processing time first), each to the
micro-batch that has the most room below its level among those whose token limit allows it. The micro-batches are then
regrouped: the R most expensive ones form one micro-step, and so on, and each micro-step is assigned to ranks such that
the ranks' totals stay close to each other.

If the resulting step takes much longer than an even distribution of the total cost would, other levels are tried and
the fastest step is used: equal levels, which suit samples of two sizes, and higher levels for the first half of the
micro-steps, which suit a few long samples.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Shares", "share"]

#: Indices of the samples of each micro-batch, as nested lists `[R][M]`.
Shares = list[list[list[int]]]
Floats = NDArray[np.float64]

# A step that takes at most this multiple of the mean over ranks is accepted without trying other levels.
_NEAR = 1.02
# Level of the first half of the micro-steps in the last attempt, relative to the average level.
_STEEP = 1.35


def share(costs: ArrayLike, tokens: Sequence[int], ranks: int, micro_steps: int, max_tokens: int) -> Shares | None:
    """Distribute the samples of a step over micro-batches.

    Args:
        costs: predicted seconds of each sample.
        tokens: number of tokens of each sample.
        ranks: number of ranks R.
        micro_steps: number of micro-steps M.
        max_tokens: maximum number of tokens per micro-batch.

    Returns:
        For each rank and micro-step the indices of its samples. Each sample is in exactly one micro-batch, and no
        micro-batch is empty. None if the samples do not fit.
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
    # With levels of cost the token limit can't be met, so the samples are distributed by tokens.
    held = _fill(size.astype(float), size, np.full(bins, float(max_tokens)), max_tokens)
    return None if held is None else _dealt(held, cost, ranks)[1]


def _tried(costs: Floats, ranks: int, micro_steps: int) -> Iterator[Floats]:
    """Yield the levels of the micro-steps to try; `costs` are in descending order."""
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
    """Return the level T of each micro-step in descending order; `costs` are in descending order."""
    highest = costs[: ranks * micro_steps : ranks]
    average = costs.sum() / ranks
    for above in range(micro_steps):
        level = (average - highest[:above].sum()) / (micro_steps - above)
        if highest[above] <= level:
            return np.concatenate([highest[:above], np.full(micro_steps - above, level)])
    return highest.copy()


def _fill(cost: Floats, size: NDArray[np.int64], levels: Floats, max_tokens: int) -> list[list[int]] | None:
    """Return the samples of each micro-batch, or None if they do not fit."""
    held: list[list[int]] = [[] for _ in levels]
    left = [max_tokens] * len(levels)
    order = np.argsort(-cost, kind="stable").tolist()
    costs, sizes = cost.tolist(), size.tolist()
    smallest = np.minimum.accumulate(size[order][::-1])[::-1].tolist()  # among the current and later samples
    room = [(-level, number) for number, level in enumerate(levels.tolist())]
    heapq.heapify(room)
    empty = len(levels)
    for turn, sample in enumerate(order):
        must_open = len(order) - turn == empty  # the remaining samples are just enough for the empty micro-batches
        passed = []
        place = None
        while room:
            entry = heapq.heappop(room)
            number = entry[1]
            if must_open and held[number]:
                continue  # not needed again, since all later samples go to empty micro-batches
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
    """Group micro-batches of similar cost into micro-steps and assign them to ranks.

    In each micro-step, the most expensive micro-batch goes to the rank with the smallest total so far.

    Returns:
        The cost of the step, and the samples by rank and micro-step.
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
