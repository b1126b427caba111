"""Simulation of balanced training on a latency table, for design studies; results are simulated and not measured.

The simulation covers compute times, as the latency table has them, and the ranks' waiting for each other. It leaves out
the communication of weights and gradients, the optimizer, and noise. Samples are batched at random, by length, or by
predicted seconds, and budgets are fixed or tuned, in any combination. The guard of the tuning (:mod:`.tuning`) needs
the coverage, the share of the router's weight on the keys within a budget, which the caller provides as a function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from effpass.core.errors import EffpassError
from effpass.trainers.balance.costs import micro_batches, sample_seconds
from effpass.trainers.balance.expected import Expected
from effpass.trainers.balance.shares import Shares, share
from effpass.trainers.balance.table import LatencyTable
from effpass.trainers.balance.tuning import Tuning, guard, imbalance, micro_batch_seconds, slowest, tune

__all__ = ["Batching", "Layout", "Simulated", "Step", "play", "simulate"]

Floats = NDArray[np.float64]
Batching = Literal["random", "length", "seconds"]
Coverage = Callable[[Any, Any], Floats]


@dataclass(frozen=True)
class Layout:
    """Shape of a step.

    Attributes:
        ranks: number of ranks R.
        micro_steps: number of micro-steps M, the micro-batches of each rank in a step.
        samples: number of samples per micro-batch; with batching other than random, their mean number.
        max_tokens: maximum number of tokens per micro-batch; ignored with random batching.
    """

    ranks: int
    micro_steps: int
    samples: int
    max_tokens: int

    @property
    def batch(self) -> int:
        """Number of samples per step, over all ranks."""
        return self.ranks * self.micro_steps * self.samples


@dataclass(frozen=True)
class Simulated:
    """Means over the simulated steps.

    Attributes:
        seconds: duration of a step in seconds.
        imbalance: slowest over mean time of the micro-batches that wait for each other.
        bubble: share of the ranks' time that is spent waiting.
        budget: budget in keys, averaged over documents and layers.
        coverage: covered share of the router's weight, averaged over tokens.
        steps: duration of each step in seconds.
    """

    seconds: float
    imbalance: float
    bubble: float
    budget: float
    coverage: float
    steps: tuple[float, ...]


@dataclass(frozen=True)
class Step:
    """One simulated step.

    Attributes:
        lengths: length of each sample in tokens.
        shares: indices of the samples, by rank and micro-step.
        budgets: budget of each micro-batch in keys `[R, M]`, the same in all layers.
        seconds: time of each micro-batch in seconds `[R, M]`.
        coverage: covered share of the router's weight, averaged over tokens.
    """

    lengths: NDArray[np.int64]
    shares: Shares
    budgets: NDArray[np.int64]
    seconds: Floats
    coverage: float


def simulate(
    table: LatencyTable,
    lengths: ArrayLike,
    layout: Layout,
    tuning: Tuning,
    coverage: Coverage,
    batching: Batching,
    *,
    steps: int,
    seed: int = 0,
) -> Simulated:
    """Simulate `steps` steps and return means; arguments and errors are those of :func:`play`."""
    played = list(play(table, lengths, layout, tuning, coverage, batching, steps=steps, seed=seed))
    seconds = tuple(slowest(step.seconds, tuning.waits) for step in played)
    waited = [imbalance(step.seconds, tuning.waits) for step in played]
    counts = [[[len(micro) for micro in rank] for rank in step.shares] for step in played]
    return Simulated(
        seconds=float(np.mean(seconds)),
        imbalance=float(np.mean([ratio for ratio, _ in waited])),
        bubble=float(np.mean([bubble for _, bubble in waited])),
        budget=float(np.mean([np.average(step.budgets, weights=n) for step, n in zip(played, counts, strict=True)])),
        coverage=float(np.mean([step.coverage for step in played])),
        steps=seconds,
    )


def play(
    table: LatencyTable,
    lengths: ArrayLike,
    layout: Layout,
    tuning: Tuning,
    coverage: Coverage,
    batching: Batching,
    *,
    steps: int,
    seed: int = 0,
) -> Iterator[Step]:
    """Simulate steps one after the other, each planned with the budgets that the steps before it had.

    Args:
        table: latency table of the device.
        lengths: lengths in tokens of the samples of a dataset; each epoch draws them without replacement.
        layout: shape of a step.
        tuning: how budgets may change; with direction `none` they stay at the default.
        coverage: function of document lengths `[..., 1]` and budgets `[..., K]` that returns the coverage `[..., K]`,
            the same in all layers.
        batching: how samples are distributed.
        steps: number of steps to simulate.
        seed: seed of the order of the samples.

    Yields:
        The steps.

    Raises:
        EffpassError: if there are too few samples for a step, or if the samples of a step do not fit.
    """
    all_lengths = np.asarray(lengths, dtype=np.int64)
    if len(all_lengths) < layout.batch:
        raise EffpassError(f"a step takes {layout.batch} samples, and there are {len(all_lengths)}")
    rng = np.random.default_rng(seed)
    per_epoch = len(all_lengths) // layout.batch
    epochs = [rng.permutation(len(all_lengths))[: per_epoch * layout.batch] for _ in range(0, steps, per_epoch)]
    order = np.concatenate(epochs)
    expected = Expected(tuning, 1)
    keys = np.asarray(tuning.budgets)
    for step in range(steps):
        sizes = all_lengths[order[step * layout.batch : (step + 1) * layout.batch]]
        shares = _shared(table, sizes, layout, batching, expected.budgets(sizes, step))
        attention, rest, longest = micro_batches(table, shares, sizes, tuning.budgets)
        attention *= table.layers  # all layers are equal here and treated as one layer that takes the time of all
        lowest, highest = guard(coverage(longest[..., None], keys)[..., None, :], tuning.index, tuning.p)
        chosen = tune(attention, rest, lowest, highest, tuning)
        budgets = keys[chosen[..., 0]]
        own = np.empty(len(sizes), dtype=np.int64)
        for rank, row in zip(shares, budgets, strict=True):
            for micro, budget in zip(rank, row, strict=True):
                own[micro] = budget
        covered = float(np.average(coverage(sizes[:, None], own[:, None])[:, 0], weights=sizes))
        expected.end_step(sizes.tolist(), own.tolist())
        yield Step(sizes, shares, budgets, micro_batch_seconds(attention, rest, chosen), covered)


def _shared(
    table: LatencyTable, sizes: NDArray[np.int64], layout: Layout, batching: Batching, budgets: Floats
) -> Shares:
    ranks, micro_steps = layout.ranks, layout.micro_steps
    if batching == "random":  # the samples are in random order already
        parts = np.arange(len(sizes)).reshape(ranks, micro_steps, layout.samples)
        return [[micro.tolist() for micro in rank] for rank in parts]
    costs = sizes.astype(float)
    if batching == "seconds":
        costs = sample_seconds(table, sizes, budgets, float(sizes.sum()) / (ranks * micro_steps))
    found = share(costs, sizes.tolist(), ranks, micro_steps, layout.max_tokens)
    if found is None:
        raise EffpassError(
            f"{len(sizes)} samples of {int(sizes.sum())} tokens do not fit into {ranks} x {micro_steps} micro-batches"
            f" of {layout.max_tokens}",
            hint="raise max_tokens",
        )
    return found
