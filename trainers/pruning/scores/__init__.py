"""Ways to say how much each unit matters, measured once before a cut: one file each.

A method is a function `scores(model, units, calibration)` that gives float32 `[L, R, N]` for each family, larger for
what matters more. :mod:`~effpass.trainers.pruning.scores.depth` scores whole layers instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Calibration"]


@dataclass(frozen=True)
class Calibration:
    """What a method may look at.

    Attributes:
        batches: token ids `[B, T]` each, on the model's device.
        seed: for methods that draw.
    """

    batches: Sequence[Tensor]
    seed: int = 0
