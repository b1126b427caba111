"""Methods that score the importance of units once, before the cut; one module per method.

A method is a function `scores(model, units, calibration)`. Its arguments are the model, its units by family
(:mod:`effpass.trainers.pruning.units`) and the calibration data. It returns for each family float32 scores `[L, R, N]`
(L layers, R sets of units per layer, N units per set); a higher score means a more important unit.
:mod:`~effpass.trainers.pruning.scores.depth` scores whole layers instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Calibration"]


@dataclass(frozen=True)
class Calibration:
    """Data that a method may use.

    Attributes:
        batches: batches of token ids `[B, T]`, on the model's device.
        seed: seed of methods that draw random numbers.
    """

    batches: Sequence[Tensor]
    seed: int = 0
