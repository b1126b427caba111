"""How β falls over the optimiser steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from effpass.core.errors import EffpassError

__all__ = ["AnnealSchedule"]

# Share of the steps that the linear adapter has for itself, at least.
_LEAST_TAIL = 0.1


@dataclass(frozen=True)
class AnnealSchedule:
    """β of each optimiser step, counted from 0: 1 before `start`, falling to exactly 0 at `end`, and 0 from there on.

    Attributes:
        steps: optimiser steps of the run.
        start: share of the steps before β falls.
        end: share of the steps after which β is 0; at most 0.9, since the linear adapter has to be trained as well.
        kind: `cosine` or `linear`.
        hold: steps for which β stays the same; in reinforcement learning those of one cycle of rollouts and updates.

    Raises:
        EffpassError: a value out of range, or so few steps that none is left at β = 0.
    """

    steps: int
    start: float = 0.0
    end: float = 0.3
    kind: Literal["cosine", "linear"] = "cosine"
    hold: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "hold"):
            if getattr(self, name) < 1:
                raise EffpassError(f"anneal {name}: got {getattr(self, name)}, expected at least 1")
        if not 0 <= self.start < self.end <= 1 - _LEAST_TAIL:
            raise EffpassError(
                f"anneal from {self.start} to {self.end} of the steps: expected 0 <= start < end <= {1 - _LEAST_TAIL}",
                hint="the adapter is linear after `end`, and needs the rest of the steps to learn as it will be used",
            )
        if self.kind not in ("cosine", "linear"):
            raise EffpassError(f"anneal kind: got {self.kind!r}, expected 'cosine' or 'linear'")
        if self.last >= self.steps:
            raise EffpassError(
                f"{self.steps} steps, with β held for {self.hold}, leave none at β = 0",
                hint="more steps, or an earlier end of the anneal",
            )

    @property
    def last(self) -> int:
        """The first step with β = 0."""
        first = round(self.start * self.steps)
        end = max(first + 1, round(self.end * self.steps))
        return -(-end // self.hold) * self.hold

    def beta(self, step: int) -> float:
        """β of a step."""
        if step >= self.last:
            return 0.0
        first = round(self.start * self.steps)
        done = max(0, step // self.hold * self.hold - first) / (self.last - first)
        return (1 + math.cos(math.pi * done)) / 2 if self.kind == "cosine" else 1 - done
