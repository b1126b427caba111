"""Schedule of β, the weight of the activation in an AFA-LoRA adapter, over the optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from effpass.core.errors import EffpassError

__all__ = ["AnnealSchedule"]

# Minimum share of the steps at the end in which the adapter is linear.
_LEAST_TAIL = 0.1


@dataclass(frozen=True)
class AnnealSchedule:
    """Schedule of β: 1 before `start`, decreasing to exactly 0 at `end`, and 0 afterwards. Steps are counted from 0.

    Attributes:
        steps: number of optimizer steps of the run.
        start: share of the steps before β starts to decrease.
        end: share of the steps after which β is 0; at most 0.9, since the linear adapter needs training as well.
        kind: shape of the decrease, `cosine` or `linear`.
        hold: number of consecutive steps with the same β; in reinforcement learning, the optimizer steps of one cycle
            of rollouts and updates.

    Raises:
        EffpassError: if a value is out of range, or if no step is left with β = 0.
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
        """Index of the first step with β = 0."""
        first = round(self.start * self.steps)
        end = max(first + 1, round(self.end * self.steps))
        return -(-end // self.hold) * self.hold

    def beta(self, step: int) -> float:
        """Return β of a step."""
        if step >= self.last:
            return 0.0
        first = round(self.start * self.steps)
        done = max(0, step // self.hold * self.hold - first) / (self.last - first)
        return (1 + math.cos(math.pi * done)) / 2 if self.kind == "cosine" else 1 - done
