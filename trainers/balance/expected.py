"""What the last steps showed, by length: the budgets that tuning gave, and how the router's weight was covered.

Documents of an octave of lengths go together. Averages move: `x ← β x + (1 − β) new`. Every rank sees the same numbers
in the same order, so every rank has the same averages; the state of a checkpoint holds them.
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
# Steps that a loader may plan ahead of training, at most.
_REMEMBERED = 64


def octave(lengths: ArrayLike) -> Ints:
    """Of each length: 10 for 1024 tokens to 2047."""
    return np.log2(np.maximum(np.asarray(lengths), 1)).astype(np.int64).clip(0, _OCTAVES - 1)


class Expected:
    """
    Args:
        tuning: which budgets there are.
        layers: L.

    Attributes:
        steps: that were observed.
    """

    def __init__(self, tuning: Tuning, layers: int) -> None:
        self.tuning, self.layers, self.steps = tuning, layers, 0
        self._budgets = np.full(_OCTAVES, float(tuning.default))
        self._coverage = np.full((_OCTAVES, layers, len(tuning.budgets)), np.nan)
        self._past: deque[Floats] = deque([self._budgets.copy()], maxlen=_REMEMBERED)

    def budgets(self, lengths: ArrayLike, after: int) -> Floats:
        """What documents of these lengths are expected to have, in keys, by the first `after` steps.

        Raises:
            EffpassError: so many steps were not observed yet.
        """
        if after > self.steps:
            raise EffpassError(
                f"batches of a step are planned by what {after} steps showed, and {self.steps} are done",
                hint="the loader runs further ahead: raise `ahead` of BalancedBatches, or lower its workers",
            )
        behind = min(self.steps - after, len(self._past) - 1)
        return self._past[-1 - behind][octave(lengths)]

    def guard(self, longest: ArrayLike) -> tuple[Ints, Ints]:
        """Budgets that the router's weight allows in micro-batches whose longest documents are these: two arrays of
        indices `[..., L]`. Lengths whose coverage was not seen yet keep the default."""
        unseen, keep = np.isnan(self._coverage).any(-1), self.tuning.index
        lowest, highest = guard(np.nan_to_num(self._coverage), keep, self.tuning.p)
        where = octave(longest)
        return np.where(unseen, keep, lowest)[where], np.where(unseen, keep, highest)[where]

    def cover(self, longest: int, curves: Floats) -> None:
        """Coverage of each layer and budget `[L, K]`, as measured in a micro-batch with this longest document."""
        if curves.shape != self._coverage.shape[1:]:
            raise EffpassError(f"coverage: got shape {curves.shape}, expected {self._coverage.shape[1:]}")
        where = int(octave(longest))
        curves = np.maximum.accumulate(curves.clip(0, 1), -1)  # budgets hold each other; what falls is rounding
        old = self._coverage[where]
        self._coverage[where] = np.where(np.isnan(old), curves, _BETA * old + (1 - _BETA) * curves)

    def coverage(self, longest: ArrayLike) -> Floats:
        """`[..., L, K]`; NaN where nothing was seen."""
        return self._coverage[octave(longest)]

    def end_step(self, lengths: Sequence[int], budgets: Sequence[float]) -> None:
        """Documents of all ranks in a step, and the mean over layers of the budgets that each had."""
        where, found = octave(lengths), np.asarray(budgets, float)
        for number in np.unique(where):
            mean = found[where == number].mean()
            self._budgets[number] = _BETA * self._budgets[number] + (1 - _BETA) * mean
        self.steps += 1
        self._past.append(self._budgets.copy())

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists alone: JSON holds them."""
        unseen = np.isnan(self._coverage)
        return {
            "steps": self.steps,
            "budgets": list(self.tuning.budgets),
            "past": [row.tolist() for row in self._past],
            "coverage": np.where(unseen, -1.0, self._coverage).tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            EffpassError: the state is of other budgets or layers.
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
