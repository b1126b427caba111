"""Steps of balanced training, played on a latency table: for design, and not a measurement.

What it says is to be called simulated. It knows compute alone, as the table has it, and who waits for whom: no
exchange of weights or gradients, no optimiser, no noise. Batching is random, goes by lengths, or goes by expected
seconds; budgets stay or are tuned; each alone and together. Coverage of the router's weight, which the guard needs,
is a function that the caller gives.
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
    """A step's micro-batches.

    Attributes:
        ranks: R.
        micro_steps: M.
        samples: of a micro-batch, where batching is random; in the mean otherwise.
        max_tokens: that a micro-batch may hold, where batching is not random.
    """

    ranks: int
    micro_steps: int
    samples: int
    max_tokens: int

    @property
    def batch(self) -> int:
        return self.ranks * self.micro_steps * self.samples


@dataclass(frozen=True)
class Simulated:
    """Means over the steps that were played.

    Attributes:
        seconds: of a step.
        imbalance: of a group, slowest over mean.
        bubble: share of the ranks' time in which they wait.
        budget: keys, over documents and layers.
        coverage: of the router's weight, over tokens.
        steps: seconds of each.
    """

    seconds: float
    imbalance: float
    bubble: float
    budget: float
    coverage: float
    steps: tuple[float, ...]


@dataclass(frozen=True)
class Step:
    """One step as it is played.

    Attributes:
        lengths: of its samples.
        shares: numbers of samples, by rank and micro-step.
        budgets: keys of each micro-batch `[R, M]`, the same in all layers.
        seconds: of each micro-batch `[R, M]`.
        coverage: of the router's weight, over tokens.
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
    """Play `steps` steps; arguments and errors as of :func:`play`."""
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
    """Steps, one after the other, with what the ones before showed.

    Args:
        table: of the device.
        lengths: of the samples of a dataset, drawn without return until all were read.
        layout: of a step.
        tuning: with direction `none`, budgets stay at the default.
        coverage: of documents with these lengths `[..., 1]` by budgets `[..., K]`: `[..., K]`; the same in all layers.
        batching: how samples are shared out.
        steps: that are played.
        seed: of the order.

    Raises:
        EffpassError: too few samples for a step, or samples that do not fit into it.
    """
    every = np.asarray(lengths, dtype=np.int64)
    if len(every) < layout.batch:
        raise EffpassError(f"a step takes {layout.batch} samples, and there are {len(every)}")
    rng = np.random.default_rng(seed)
    per_epoch = len(every) // layout.batch
    epochs = [rng.permutation(len(every))[: per_epoch * layout.batch] for _ in range(0, steps, per_epoch)]
    order = np.concatenate(epochs)
    expected = Expected(tuning, 1)
    keys = np.asarray(tuning.budgets)
    for step in range(steps):
        sizes = every[order[step * layout.batch : (step + 1) * layout.batch]]
        shares = _shared(table, sizes, layout, batching, expected.budgets(sizes, step))
        attention, rest, longest = micro_batches(table, shares, sizes, tuning.budgets)
        attention *= table.layers  # all layers are alike here, so that they are one with the time of all
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
    if batching == "random":  # they come in an order that was drawn
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
