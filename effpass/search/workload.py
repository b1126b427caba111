"""What a search optimizes: the goal, and the sizes of the requests that recipes are measured with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from effpass.core.errors import EffpassError

__all__ = ["GOALS", "Goal", "Workload", "parse_share"]

Goal = Literal["latency", "memory", "throughput"]
GOALS: tuple[Goal, ...] = get_args(Goal)


@dataclass(frozen=True)
class Workload:
    """Sizes of the requests that recipes are measured with.

    Attributes:
        batch: number of sequences in a batch.
        prompt: number of tokens of each prompt.
        new_tokens: number of tokens after each prompt. Their decode steps are timed, and their loss is the measure of
            quality.
        sequences: number of sequences of `prompt` + `new_tokens` tokens that losses are measured on.
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
        """Number of tokens of a sequence: prompt and new tokens."""
        return self.prompt + self.new_tokens


def parse_share(name: str, given: str) -> float:
    """Parse a share given as a percentage (``"1%"``) or as a fraction (``"0.01"``).

    Args:
        name: name of the option, for messages.
        given: text to parse.

    Raises:
        EffpassError: `given` is neither, or is not at least 0 and below 1.
    """
    text = given.strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise EffpassError(f"{name}: got {given!r}, expected a share such as 1% or 0.01")
    return share
