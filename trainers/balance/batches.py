"""A batch sampler whose micro-batches cost alike on all ranks, for any dataset whose samples have lengths.

An epoch is shuffled by the seed and cut into steps of `batch` samples; within a step, and never across steps, samples
are shared out by what they are expected to cost (:mod:`.shares`): which samples a step learns from stays as it was.
Every rank makes the same plan from the same numbers, without talking to others, and yields its own part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from effpass.core.errors import EffpassError
from effpass.trainers.balance.costs import sample_seconds
from effpass.trainers.balance.expected import Expected
from effpass.trainers.balance.shares import Shares, share
from effpass.trainers.balance.table import LatencyTable

__all__ = ["BalancedBatches"]


class BalancedBatches(Sampler[list[int]]):
    """Give it to a DataLoader as `batch_sampler`; each of its lists is one micro-batch of this rank.

    Args:
        lengths: tokens of each sample of the dataset.
        table: what lengths and budgets cost.
        batch: samples of an optimiser step, over all ranks.
        micro_steps: micro-batches of each rank in a step: its gradient accumulation.
        max_tokens: that a micro-batch may hold.
        rank, world: this process among those that read other data, and how many they are.
        expected: budgets as the tuner moves them, the same object that it has.
        budget: where there is no tuner, that of every sample.
        ahead: steps that the loader may be ahead of training. Plans go by what was known so many steps before, so that
            they are the same however early a rank asks. 1 is enough without workers; with them, one more than
            workers · prefetch_factor / micro_steps.
        seed: of the order.

    Attributes:
        steps: of an epoch. Where the samples are no multiple of `batch`, the last one has the rest, or, where the rest
            is too small for all ranks, the rest besides its own.

    Raises:
        EffpassError: a sample that no micro-batch can hold, or too few samples for each rank to have one.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        table: LatencyTable,
        *,
        batch: int,
        max_tokens: int,
        micro_steps: int = 1,
        rank: int = 0,
        world: int = 1,
        expected: Expected | None = None,
        budget: int | None = None,
        ahead: int = 1,
        seed: int = 0,
    ) -> None:
        sizes = np.asarray(lengths, dtype=np.int64)
        least = world * micro_steps
        if min(batch, len(sizes)) < least:
            what = f"a batch of {batch}" if batch < least else f"a dataset of {len(sizes)}"
            raise EffpassError(
                f"{what} samples leaves a rank without any: {world} ranks of {micro_steps} micro-batches take {least}",
                hint="raise batch, or lower micro_steps",
            )
        if sizes.min() < 1:
            raise EffpassError(f"sample {int(sizes.argmin())} has {int(sizes.min())} tokens, expected 1 or more")
        if sizes.max() > max_tokens:
            count = int((sizes > max_tokens).sum())
            raise EffpassError(
                f"sample {int(sizes.argmax())} has {int(sizes.max())} tokens, and a micro-batch {max_tokens}"
                + (f" ({count} samples are too long)" if count > 1 else ""),
                hint="raise max_tokens, or shorten or remove them: nothing is cut off",
            )
        if (expected is None) == (budget is None):
            raise EffpassError("give either expected, the tuner's, or budget, a number of keys for all samples")
        if not 0 <= ahead < 64:
            raise EffpassError(f"ahead: got {ahead}, expected steps from 0 to 63")
        if not 0 <= rank < world:
            raise EffpassError(f"rank: got {rank} of {world}")
        self.lengths, self.table, self.max_tokens = sizes, table, max_tokens
        self.batch, self.micro_steps, self.rank, self.world = batch, micro_steps, rank, world
        self.expected, self.budget, self.ahead, self.seed = expected, budget, ahead, seed
        full, rest = divmod(len(sizes), batch)
        self.steps = max(1, full + (rest >= least))
        self._epoch, self._step = 0, 0
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return self.steps * self.micro_steps

    def __iter__(self) -> Iterator[list[int]]:
        if self._step == self.steps:  # all of an epoch was given; whoever took it need not have asked for more
            self._epoch, self._step = self._epoch + 1, 0
        while self._step < self.steps:
            mine = self.plan(self._epoch, self._step)[self.rank]
            self._step += 1  # a step is planned and given as a whole
            yield from mine

    def plan(self, epoch: int, step: int) -> Shares:
        """Samples of all ranks and micro-steps.

        Raises:
            EffpassError: the samples do not fit, or the budgets of the steps before are not known yet.
        """
        last = step == self.steps - 1
        samples = self._epoch_order(epoch)[step * self.batch : None if last else (step + 1) * self.batch]
        sizes = self.lengths[samples]
        if self.expected is None:
            budgets = np.full(len(samples), float(self.budget or 0))
        else:
            budgets = self.expected.budgets(sizes, max(0, epoch * self.steps + step - self.ahead))
        average = sizes.sum() / (self.world * self.micro_steps)
        costs = sample_seconds(self.table, sizes, budgets, float(average))
        found = share(costs, sizes.tolist(), self.world, self.micro_steps, self.max_tokens)
        if found is None:
            raise EffpassError(
                f"step {step} of epoch {epoch}: {len(samples)} samples of {int(sizes.sum())} tokens do not fit into"
                f" {self.world} x {self.micro_steps} micro-batches of {self.max_tokens}",
                hint="raise micro_steps or max_tokens, or lower batch",
            )
        return [[[int(samples[n]) for n in micro] for micro in rank] for rank in found]

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch; the one that is running, or was resumed, goes on."""
        if epoch != self._epoch or self._step == self.steps:
            self._epoch, self._step = epoch, 0

    def state_dict(self, steps: int | None = None) -> dict[str, Any]:
        """Where to go on.

        Args:
            steps: that were trained, over all epochs; by default those that were given, of which a loader with workers
                holds some back.
        """
        done = self._epoch * self.steps + self._step if steps is None else steps
        return {"steps": done, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            EffpassError: the state is of another run.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise EffpassError(
                    f"the checkpoint's {name} is {state[name]}, and this run's {value}",
                    hint="go on with the same data, batch, ranks and seed, or start anew",
                )
        self._epoch, self._step = divmod(int(state["steps"]), self.steps)

    def _identity(self) -> dict[str, int]:
        """What the plans of a run depend on, but for averages."""
        return {
            "samples": len(self.lengths), "tokens": int(self.lengths.sum()), "batch": self.batch,
            "micro_steps": self.micro_steps, "max_tokens": self.max_tokens, "world": self.world, "seed": self.seed,
        }  # fmt: skip

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))
        return self._order[1]
