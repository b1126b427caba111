"""What a recipe is to be good at, and at what: the goal, and the requests that it is measured with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from effpass.core.errors import EffpassError

__all__ = ["GOALS", "Goal", "Workload", "parse_share"]

Goal = Literal["latency", "memory", "throughput"]
GOALS: tuple[Goal, ...] = get_args(Goal)


@dataclass(frozen=True)
class Workload:
    """Requests of one size.

    Attributes:
        batch: sequences at a time.
        prompt: tokens of each prompt.
        new_tokens: tokens that follow; all of them are timed, and their loss is the quality.
        sequences: pieces of text that losses are measured on, each of `prompt` and `new_tokens`.
    """

    batch: int = 1
    prompt: int = 1024
    new_tokens: int = 64
    sequences: int = 16

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("prompt", 1), ("new_tokens", 4), ("sequences", 2)):
            if getattr(self, name) < least:
                raise EffpassError(f"{name} is {getattr(self, name)}", hint=f"give {least} or more")

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.prompt + self.new_tokens


def parse_share(name: str, given: str) -> float:
    """``"1%"`` or ``"0.01"`` as 0.01.

    Raises:
        EffpassError: neither, or not between 0 and 1.
    """
    text = given.strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise EffpassError(f"{name}: got {given!r}, expected a share such as 1% or 0.01")
    return share
