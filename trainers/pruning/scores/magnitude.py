"""Magnitude ‖W_in‖ · ‖W_out‖ of the weights of a unit, without data (:mod:`effpass.passes.weights.magnitude`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effpass.passes.weights.magnitude import magnitudes
from effpass.trainers.pruning.scores import Calibration
from effpass.trainers.pruning.units import Units

__all__ = ["scores"]


def scores(model: Any, units: Mapping[str, Units], calibration: Calibration) -> dict[str, Tensor]:
    """Return the scores of all units; see :mod:`effpass.trainers.pruning.scores`."""
    return {family: torch.stack(list(magnitudes(model, family).values())) for family in units}
