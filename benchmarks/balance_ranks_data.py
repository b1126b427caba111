"""What case `ranks` of area `balance` trains on: sizes of the model, and samples with their random batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effpass.trainers.balance import BalancedBatches
from effpass.trainers.balance.shares import Shares
from effpass.trainers.balance.table import LatencyTable, from_flops
from effpass.trainers.finetune.samples import Sample
from effpass.trainers.finetune.settings import Sparse

__all__ = ["LARGE", "MICRO_STEPS", "TINY", "WARM", "Data", "Sizes"]

MICRO_STEPS, SAMPLES = 2, 2
WARM = 3  # steps of each way that do not count


@dataclass(frozen=True)
class Sizes:
    """Of a model and its run; lengths are divided by `scale`, and `steps` of each way count."""

    width: int
    inner: int
    heads: int
    groups: int
    size: int
    vocabulary: int
    layers: int
    sparse: Sparse
    scale: int
    steps: int


LARGE = Sizes(2048, 6144, 16, 8, 128, 16384, 4, Sparse(4096, 256, is_balanced=True), 2, 10)
TINY = Sizes(64, 96, 4, 2, 16, 128, 2, Sparse(96, 32, is_balanced=True), 128, 2)


class Data:
    """Samples, and the random batches of each step.

    Attributes:
        lengths: of the samples.
        even: a table by which a sample costs what its length is.
        random: shares of each step.
        largest: of the random micro-batches.
        most: its tokens, which no other micro-batch exceeds.
    """

    def __init__(self, draw: Callable[..., NDArray[np.int64]], of: Sizes, world: int) -> None:
        self.world, self.batch, self.steps = world, world * MICRO_STEPS * SAMPLES, WARM + of.steps
        rng, count = np.random.default_rng(0), self.batch * self.steps
        # Whole multiples of 16: all matrices are aligned alike.
        self.lengths: list[int] = np.maximum(draw(count, rng) // of.scale // 16 * 16, 16).tolist()
        self.samples = [Sample(rng.integers(of.vocabulary, size=n), np.arange(n) > 0, 0) for n in self.lengths]
        budgets = of.sparse.tuning.budgets
        self.even = from_flops((256,), budgets, layers=1, attention_width=1, parameters=10**12, rate=1e15)
        self.most = sum(self.lengths)
        batches = self.batches(self.even, budget=budgets[0])  # for which samples a step has
        self.random: list[Shares] = []
        for step in range(self.steps):
            found = sorted(n for rank in batches.plan(0, step) for micro in rank for n in micro)
            self.random.append(rng.permutation(found).reshape(world, MICRO_STEPS, SAMPLES).tolist())
        micros = [micro for shares in self.random for rank in shares for micro in rank]
        self.largest = max(micros, key=lambda micro: sum(self.lengths[n] for n in micro))
        self.most = sum(self.lengths[n] for n in self.largest)

    def batches(self, table: LatencyTable, **budgets: Any) -> BalancedBatches:
        return BalancedBatches(
            self.lengths, table, batch=self.batch, max_tokens=self.most, micro_steps=MICRO_STEPS, world=self.world,
            **budgets,
        )  # fmt: skip
