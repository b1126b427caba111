"""The decision whether to speculate, by comparing rounds with plain decode steps.

A round pays off if it emits more tokens than plain steps would in the same time. Both times are measured during
generation, as medians of the latest ones, and the number of tokens that a round emits is a moving average. If rounds do
not pay off, plain steps run for a while, and then a few rounds are tried again. After several such trials the rest of
the generation is plain.
"""

from __future__ import annotations

from collections import deque
from statistics import median

__all__ = ["Pace"]

_PLAIN_AT_FIRST = 3  # plain steps at the start, to measure their time
_ROUNDS_AT_FIRST = 8  # rounds before the first decision
_PAUSE, _TRIAL, _TRIALS = 32, 4, 3  # plain steps of a pause, rounds of a trial, maximum number of trials
_LATEST = 0.1  # weight of a new number of tokens, once there are ten
_TIMES = 15  # number of measured times to take the median of, so that a single interruption does not count


class Pace:
    """Decides between rounds and plain steps, for one kind of tree and one batch size.

    Measured times are kept between generations.

    Args:
        switches: whether to use plain steps at all; False to speculate always.

    Attributes:
        plain: seconds per plain step; None until one was measured.
        round: seconds per round; None until one was measured.
        gain: tokens per sequence that a round emits; None until a round was observed.
        has_given_up: whether the rest of the generation is plain.
    """

    def __init__(self, *, switches: bool = True) -> None:
        self.switches = switches
        self._plain: deque[float] = deque(maxlen=_TIMES)
        self._round: deque[float] = deque(maxlen=_TIMES)
        self.gain: float | None = None
        self._observed = 0
        self.begin()

    def begin(self) -> None:
        """Start a new generation: reset `gain` and the trials, and keep the measured times."""
        self._forget_gain()
        self.has_given_up = False
        self._left = _ROUNDS_AT_FIRST if self.plain is not None else -_PLAIN_AT_FIRST
        self._trials = 0

    @property
    def plain(self) -> float | None:
        return median(self._plain) if self._plain else None

    @property
    def round(self) -> float | None:
        return median(self._round) if self._round else None

    @property
    def speculates(self) -> bool:
        """Whether the next step is a round."""
        return not self.switches or (self._left >= 0 and not self.has_given_up)

    def next(self) -> bool:
        """Return whether the current step is a round, and advance to the next one."""
        speculates = self.speculates
        if not self.switches or self.has_given_up:
            return speculates
        if self._left > 0:
            self._left -= 1
        elif self._left < 0:
            self._left += 1
            if self._left == 0:
                self._left = _TRIAL if self._trials else _ROUNDS_AT_FIRST
        elif not self.pays:
            self._trials += 1
            self.has_given_up = self._trials > _TRIALS
            self._left = -_PAUSE
            self._forget_gain()
            return False
        return speculates

    @property
    def pays(self) -> bool:
        """Whether a round emits more tokens than plain steps in the same time; True as long as it is unknown."""
        if self.plain is None or self.round is None or self.gain is None:
            return True
        return self.gain * self.plain > self.round

    def saw(self, *, plain: bool, seconds: float | None, gain: float) -> None:
        """Record the measurements of a step.

        Args:
            plain: whether it was a plain step, instead of a round.
            seconds: its duration; None if it is not representative, as when the step was recorded as a CUDA graph.
            gain: mean number of tokens that it emitted per sequence that had not ended.
        """
        if not plain:
            self._observed += 1
            before = self.gain or 0.0
            self.gain = before + max(_LATEST, 1 / self._observed) * (gain - before)
        if seconds is not None:
            (self._plain if plain else self._round).append(seconds)

    def _forget_gain(self) -> None:
        self.gain, self._observed = None, 0
