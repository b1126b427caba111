"""Whether to speculate: what a round takes and gives, against what plain steps take.

A round pays where it emits more tokens than plain steps would in its time. Both times are measured as they go by; what
a round emits is averaged over the last ones. Where it does not pay, plain steps run for a while, then a few rounds are
tried again, and after some such trials it is plain to the end of the generation.
"""

from __future__ import annotations

__all__ = ["Pace"]

_PLAIN_AT_FIRST = 3  # steps, to learn what they take
_ROUNDS_AT_FIRST = 8  # before the first decision
_PAUSE, _TRIAL, _TRIALS = 32, 4, 3  # steps, rounds, and how often
_LATEST = 0.1  # weight of a new measurement


class Pace:
    """Decides for one kind of tree and one batch size; times stay from one generation to the next.

    Args:
        switches: False speculates always.

    Attributes:
        plain: seconds a plain step; None until one was measured.
        round: seconds a round, likewise.
        gain: tokens that a round emits for each row, over the last ones.
        has_given_up: plain to the end of this generation.
    """

    def __init__(self, *, switches: bool = True) -> None:
        self.switches = switches
        self.plain: float | None = None
        self.round: float | None = None
        self.begin()

    def begin(self) -> None:
        """A new generation, of which nothing is known."""
        self.gain: float | None = None
        self.has_given_up = False
        self._left = _ROUNDS_AT_FIRST if self.plain is not None else -_PLAIN_AT_FIRST
        self._trials = 0

    @property
    def speculates(self) -> bool:
        """Whether the next step is a round."""
        return not self.switches or (self._left >= 0 and not self.has_given_up)

    def next(self) -> bool:
        """Whether this step is a round; counts it."""
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
            self._left, self.gain = -_PAUSE, None
            return False
        return speculates

    @property
    def pays(self) -> bool:
        """Whether a round emits more than plain steps in its time; True while that is unknown."""
        if self.plain is None or self.round is None or self.gain is None:
            return True
        return self.gain * self.plain > self.round

    def saw(self, *, plain: bool, seconds: float | None, gain: float) -> None:
        """A step that was taken.

        Args:
            plain: it was no round.
            seconds: that it took; None where that says nothing, as of the first of its kind.
            gain: tokens that it emitted, over the rows that went on.
        """
        if not plain:
            self.gain = _mixed(self.gain, gain)
        if seconds is not None:
            if plain:
                self.plain = _mixed(self.plain, seconds)
            else:
                self.round = _mixed(self.round, seconds)


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else old + _LATEST * (new - old)
