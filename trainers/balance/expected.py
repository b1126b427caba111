"""Averages over the past steps by document length: budgets chosen by the tuner, and coverage of the router's weight.

Documents are grouped by octaves of their length, and averages are exponential: `x ← β x + (1 − β) new`. All ranks see
the same numbers in the same order and therefore have the same averages, which are part of the tuner's state in a
checkpoint.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from effpass.core.errors import EffpassError
from effpass.trainers.balance.tuning import Tuning, guard

__all__ = ["Expected", "octave"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_OCTAVES = 32
_BETA = 0.9
# Maximum number of steps that a data loader may plan ahead of training.
_REMEMBERED = 64


def octave(lengths: ArrayLike) -> Ints:
    """Return the octave of each length, such as 10 for 1024 to 2047 tokens."""
    return np.log2(np.maximum(np.asarray(lengths), 1)).astype(np.int64).clip(0, _OCTAVES - 1)


class Expected:
    """Averages over the past steps.

    Args:
        tuning: available budgets and their default.
        layers: number of layers L.

    Attributes:
        steps: number of steps observed so far.
    """

    def __init__(self, tuning: Tuning, layers: int) -> None:
        self.tuning, self.layers, self.steps = tuning, layers, 0
        self._budgets = np.full(_OCTAVES, float(tuning.default))
        self._coverage = np.full((_OCTAVES, layers, len(tuning.budgets)), np.nan)
        self._past: deque[Floats] = deque([self._budgets.copy()], maxlen=_REMEMBERED)

    def budgets(self, lengths: ArrayLike, after: int) -> Floats:
        """Return the expected budget in keys of documents of these lengths, as known after the first `after` steps.

        Raises:
            EffpassError: if fewer than `after` steps were observed.
        """
        if after > self.steps:
            raise EffpassError(
                f"batches of a step are planned by what {after} steps showed, and {self.steps} are done",
                hint="the loader runs further ahead: raise `ahead` of BalancedBatches, or lower its workers",
            )
        behind = min(self.steps - after, len(self._past) - 1)
        return self._past[-1 - behind][octave(lengths)]

    def guard(self, longest: ArrayLike) -> tuple[Ints, Ints]:
        """Return the budgets that the guard allows in micro-batches with these longest documents.

        Lengths for which no coverage was measured keep the default.

        Returns:
            Smallest and largest allowed budget, as two arrays of indices `[..., L]`.
        """
        unseen, keep = np.isnan(self._coverage).any(-1), self.tuning.index
        lowest, highest = guard(np.nan_to_num(self._coverage), keep, self.tuning.p)
        where = octave(longest)
        return np.where(unseen, keep, lowest)[where], np.where(unseen, keep, highest)[where]

    def cover(self, longest: int, curves: Floats) -> None:
        """Update the average coverage with a measurement.

        Args:
            longest: length of the longest document of the measured micro-batch.
            curves: coverage of each layer and budget `[L, K]`.
        """
        if curves.shape != self._coverage.shape[1:]:
            raise EffpassError(f"coverage: got shape {curves.shape}, expected {self._coverage.shape[1:]}")
        where = int(octave(longest))
        # A larger budget includes the keys of a smaller one, so that only rounding can decrease the coverage.
        curves = np.maximum.accumulate(curves.clip(0, 1), -1)
        old = self._coverage[where]
        self._coverage[where] = np.where(np.isnan(old), curves, _BETA * old + (1 - _BETA) * curves)

    def coverage(self, longest: ArrayLike) -> Floats:
        """Return the average coverage `[..., L, K]` for these longest documents; NaN where none was measured."""
        return self._coverage[octave(longest)]

    def end_step(self, lengths: Sequence[int], budgets: Sequence[float]) -> None:
        """Update the average budgets with a step.

        Args:
            lengths: lengths of the documents of all ranks.
            budgets: budget of each document in keys, averaged over layers.
        """
        where, found = octave(lengths), np.asarray(budgets, float)
        for number in np.unique(where):
            mean = found[where == number].mean()
            self._budgets[number] = _BETA * self._budgets[number] + (1 - _BETA) * mean
        self.steps += 1
        self._past.append(self._budgets.copy())

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers and lists, which JSON can hold."""
        unseen = np.isnan(self._coverage)
        return {
            "steps": self.steps,
            "budgets": list(self.tuning.budgets),
            "past": [row.tolist() for row in self._past],
            "coverage": np.where(unseen, -1.0, self._coverage).tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned.

        Raises:
            EffpassError: if the state is for other budgets or another number of layers.
        """
        coverage = np.asarray(state["coverage"], float)
        if list(state["budgets"]) != list(self.tuning.budgets) or coverage.shape != self._coverage.shape:
            raise EffpassError(
                f"the checkpoint has budgets {list(state['budgets'])} of {coverage.shape[1]} layers, and the run"
                f" {list(self.tuning.budgets)} of {self.layers}",
                hint="go on with the same budgets, or start anew",
            )
        self.steps = int(state["steps"])
        self._past = deque((np.asarray(row, float) for row in state["past"]), maxlen=_REMEMBERED)
        self._budgets = self._past[-1].copy()
        self._coverage = np.where(coverage < 0, np.nan, coverage)
