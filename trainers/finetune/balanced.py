"""Packed micro-batches that take about equal time on all ranks, and sparse attention with a tuner for a supervised run.

A step has the same samples as without balancing, namely those that packing puts into its rows (a row is one sequence of
packed samples). They are distributed anew over all processes and micro-batches by their predicted cost. A micro-batch
is then a single row, as long as its samples, and holds at most as many tokens as the rows of a micro-batch without
balancing. The loss of a step changes only by its attention and by rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effpass.core.errors import ArtifactError, EffpassError
from effpass.runtime.routed_attention import RoutedModel, install
from effpass.trainers.balance.costs import sample_seconds
from effpass.trainers.balance.expected import Expected
from effpass.trainers.balance.measure import latency_table
from effpass.trainers.balance.shares import Shares, share
from effpass.trainers.balance.table import LatencyTable
from effpass.trainers.balance.tuner import SparsityTuner
from effpass.trainers.finetune.packing import PackedBatches, make_rows
from effpass.trainers.finetune.processes import ALONE, Processes
from effpass.trainers.finetune.settings import Sparse

__all__ = ["LATENCY", "BalancedRows", "SparseRun", "load_tuner", "make_sparse", "save_tuner"]

#: File with the latency table in the working folder, so that a resumed run plans with the same numbers.
LATENCY = "latency.json"

# Steps that a data loader without workers is ahead: accelerate's fetches the next micro-batch before it yields one.
_AHEAD = 1


class BalancedRows(PackedBatches):
    """Micro-batches of a balanced run, in order.

    The arguments are those of :class:`PackedBatches`; :meth:`balance` must be called before the first micro-batch is
    read.
    """

    _table: LatencyTable
    _expected: Expected

    def balance(self, table: LatencyTable, expected: Expected) -> None:
        """Set the predictions of cost by which samples are distributed.

        Args:
            table: latency table, the same on all processes.
            expected: expected budgets, the object that the tuner updates.
        """
        self._table, self._expected = table, expected
        self._plans: dict[int, Shares] = {}

    @property
    def most_tokens(self) -> int:
        """Maximum number of tokens per micro-batch."""
        return self.batch // (self.accumulate * self.world) * self.length

    def __getitem__(self, micro: int) -> dict[str, torch.Tensor]:
        """Return micro-batch number `micro` of this process as :meth:`PackedBatches.__getitem__` does, with B = 1."""
        step, part = divmod(micro, self.accumulate)
        if step not in self._plans:
            self._plans = {step: self._plan(step)}
        mine = self._plans[step][self.rank][part]
        graded = sum(int(self.samples[n].graded.sum()) for row in self._rows_of(step) for n in row)
        length = sum(len(self.samples[n].tokens) for n in mine)
        batch = make_rows([[self.samples[n] for n in mine]], max(length, 1), self.pad)
        weights = batch.pop("graded").float() * (self.accumulate * self.world / graded)
        del batch["sample"]
        return {**batch, "weights": weights}

    def _rows_of(self, step: int) -> list[list[int]]:
        return self.rows[step * self.batch : (step + 1) * self.batch]

    def _plan(self, step: int) -> Shares:
        rows = self._rows_of(step)
        samples = [n for row in rows for n in row]
        sizes = np.array([len(self.samples[n].tokens) for n in samples])
        each = self.batch // (self.accumulate * self.world)
        budgets = self._expected.budgets(sizes, max(0, step - _AHEAD))
        average = sizes.sum() / (self.accumulate * self.world)
        costs = sample_seconds(self._table, sizes, budgets, float(average))
        found = share(costs, sizes.tolist(), self.world, self.accumulate, self.most_tokens)
        if found is not None:
            return [[[samples[n] for n in micro] for micro in rank] for rank in found]
        # Use the packed rows instead: the last step may have fewer samples than micro-batches, and full rows may not
        # fit in any other way.
        rows = rows + [[]] * (self.batch - len(rows))
        parts = [[n for row in rows[first : first + each] for n in row] for first in range(0, self.batch, each)]
        return [[parts[part * self.world + rank] for part in range(self.accumulate)] for rank in range(self.world)]


@dataclass(frozen=True)
class SparseRun:
    """Sparse attention of a run, and its balancing.

    Attributes:
        routed: model with sparse attention.
        table: latency table; None if the run is not balanced.
        tuner: tuner of the budgets; None if the run is not balanced.
    """

    routed: RoutedModel
    table: LatencyTable | None = None
    tuner: SparsityTuner | None = None

    def close(self) -> None:
        """Restore the model's own attention."""
        if self.tuner is not None:
            self.tuner.close()
        self.routed.undo()


def make_sparse(
    model: Any,
    how: Sparse,
    batches: PackedBatches,
    dtype: torch.dtype,
    file: Path | None,
    say: Callable[[str], None],
    processes: Processes = ALONE,
) -> SparseRun:
    """Install sparse attention in a model and, if `how` requests it, set up balancing.

    Args:
        model: model as it is trained, on its device.
        how: settings of attention and balancing.
        batches: micro-batches of the run; :class:`BalancedRows` if it is balanced.
        dtype: dtype of computation.
        file: latency table; None for the one in the cache.
        say: function that receives messages for the user.
        processes: which processes read different data, and which share micro-batches.

    Raises:
        ModelError: if the model does not support sparse attention.
        EffpassError: if `file` is not a table.
    """
    tuning = how.tuning
    if not how.is_balanced:
        say(f"attention to {tuning.default} keys in blocks of {how.block}")
        return SparseRun(install(model, block=how.block, budget=tuning.default))
    assert isinstance(batches, BalancedRows)
    routed = install(model, block=how.block, budget=tuning.default, max_budget=how.most)
    try:
        table = latency_table(
            model, tuning.budgets, batches.most_tokens, block=how.block, dtype=dtype, ranks=processes.sharing,
            file=file, say=say,
        )  # fmt: skip
    except EffpassError:
        routed.undo()
        raise
    say(
        f"attention to {tuning.default} keys in blocks of {how.block}, balanced: {tuning.budgets[0]} to"
        f" {tuning.budgets[-1]}, anchor {tuning.anchor}, guard {tuning.p}"
    )
    tuner = SparsityTuner(model, routed, table, tuning, group=processes.data)
    batches.balance(table, tuner.expected)
    return SparseRun(routed, table, tuner)


def save_tuner(tuner: SparsityTuner, folder: Path, rank: int) -> None:
    """Save the tuner's state of this process in a checkpoint, before the Trainer's state completes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _name(rank)).write_text(json.dumps(tuner.state_dict()))


def load_tuner(tuner: SparsityTuner, folder: Path, rank: int) -> None:
    """Restore the tuner's state of this process from a checkpoint.

    Raises:
        ArtifactError: if the checkpoint has no such state.
    """
    path = folder / _name(rank)
    try:
        state: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path}: no state of the balance: {error}", hint="go on with as many processes, or start anew"
        ) from error
    tuner.load_state_dict(state)


def _name(rank: int) -> str:
    return f"balance_{rank}.json"
