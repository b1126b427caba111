"""First-order Taylor scores (LLM-Pruner, arXiv 2305.11627; Molchanov et al., arXiv 1906.10771).

    score = mean over batches of (∂L/∂m)² at m = 1,    ∂L/∂m = Σ over the weights of the unit of weight · gradient

L is the cross entropy of the data and m the mask of the unit. The square root of a score is the magnitude of the change
of L, to first order, when the unit is removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from effpass.trainers.pruning.masks import Masks
from effpass.trainers.pruning.scores import Calibration
from effpass.trainers.pruning.units import Units

__all__ = ["mask_gradients", "scores"]


def scores(model: Any, units: Mapping[str, Units], calibration: Calibration) -> dict[str, Tensor]:
    """Return the scores of all units; see :mod:`effpass.trainers.pruning.scores`."""
    found: dict[str, Tensor] = {}
    for gradients in mask_gradients(model, units, calibration):
        for family, gradient in gradients.items():
            found[family] = found.get(family, 0) + gradient.square() / len(calibration.batches)
    return found


def mask_gradients(model: Any, units: Mapping[str, Units], calibration: Calibration) -> Iterator[dict[str, Tensor]]:
    """Yield for each batch the gradients `[L, R, N]` of the cross entropy with respect to masks that are all 1."""
    masks = Masks(model, units)
    learned = [p for p in model.parameters() if p.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        with masks.attached():
            for ids in calibration.batches:
                masks.refresh()
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                yield {family: soft.grad for family, soft in masks.soft.items() if soft.grad is not None}
                for soft in masks.soft.values():
                    soft.grad = None
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
