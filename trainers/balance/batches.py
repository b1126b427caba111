"""Batch sampler whose micro-batches take about equal time on all ranks, for any dataset with known sample lengths.

An epoch is shuffled with a seed and cut into steps of `batch` samples. Within each step, samples are distributed over
ranks and micro-batches by their predicted cost (:mod:`.shares`). They do not move between steps, so that balancing does
not change which samples a step learns from. Every rank computes the same plan from the same numbers, without
communication, and yields its part of it.
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
    """Batch sampler that balances micro-batches; each list that it yields is a micro-batch of this rank.

    Pass it to a DataLoader as `batch_sampler`.

    Args:
        lengths: length in tokens of each sample of the dataset.
        table: latency table that predicts the cost of lengths and budgets.
        batch: number of samples per optimizer step, over all ranks.
        micro_steps: number of micro-batches per rank and step, the gradient accumulation.
        max_tokens: maximum number of tokens per micro-batch.
        rank, world: index of this process among those that read different data, and their number.
        expected: expected budgets, the object that the tuner updates; None without a tuner.
        budget: budget of every sample in keys, without a tuner.
        ahead: number of steps by which the data loader may be ahead of training. A step is planned from what was known
            this many steps before it, so that its plan does not depend on when a rank requests it. Without workers 1 is
            enough; with workers use one more than workers · prefetch_factor / micro_steps.
        seed: seed of the order.

    Attributes:
        steps: number of steps per epoch. If the number of samples is not a multiple of `batch`, the last step holds the
            remainder. If the remainder is too small for all ranks, it is added to the last full step.

    Raises:
        EffpassError: if a sample exceeds `max_tokens`, if there are too few samples for every micro-batch to have one,
            or if another argument is invalid.
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
        if self._step == self.steps:  # the last epoch was complete, even if its iterator was not exhausted
            self._epoch, self._step = self._epoch + 1, 0
        while self._step < self.steps:
            mine = self.plan(self._epoch, self._step)[self.rank]
            self._step += 1  # counted before its micro-batches are yielded: a step is resumed as a whole or not at all
            yield from mine

    def plan(self, epoch: int, step: int) -> Shares:
        """Return the samples of all ranks and micro-steps in a step.

        Raises:
            EffpassError: if the samples do not fit, or if the budgets of the preceding steps are not known yet.
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
        """Start an epoch, unless it is the current one and not finished: a running or resumed epoch continues."""
        if epoch != self._epoch or self._step == self.steps:
            self._epoch, self._step = epoch, 0

    def state_dict(self, steps: int | None = None) -> dict[str, Any]:
        """Return the position from which to continue.

        Args:
            steps: number of steps that were trained, over all epochs; None for the number of steps that were yielded,
                which is larger with a data loader whose workers prefetch.
        """
        done = self._epoch * self.steps + self._step if steps is None else steps
        return {"steps": done, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position that :meth:`state_dict` returned.

        Raises:
            EffpassError: if the state belongs to another run.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise EffpassError(
                    f"the checkpoint's {name} is {state[name]}, and this run's {value}",
                    hint="go on with the same data, batch, ranks and seed, or start anew",
                )
        self._epoch, self._step = divmod(int(state["steps"]), self.steps)

    def _identity(self) -> dict[str, int]:
        """Return the values that determine the plans of a run, apart from the averages over its steps."""
        return {
            "samples": len(self.lengths), "tokens": int(self.lengths.sum()), "batch": self.batch,
            "micro_steps": self.micro_steps, "max_tokens": self.max_tokens, "world": self.world, "seed": self.seed,
        }  # fmt: skip

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))
        return self._order[1]
