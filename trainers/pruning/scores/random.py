"""Random scores, as a baseline for the other methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effpass.trainers.pruning.scores import Calibration
from effpass.trainers.pruning.units import Units

__all__ = ["scores"]


def scores(model: Any, units: Mapping[str, Units], calibration: Calibration) -> dict[str, Tensor]:
    """Draw the scores of all units with the calibration's seed; they are the same on every device."""
    generator = torch.Generator().manual_seed(calibration.seed)
    device = next(model.parameters()).device
    return {family: torch.rand(found.shape, generator=generator).to(device) for family, found in units.items()}
