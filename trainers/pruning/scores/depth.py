"""Dropping whole layers, by the Taylor scores of all that a layer adds:

    score = mean over batches of (Σ over the layer's units of ∂L/∂m)²

The sum is the gradient of a mask on both branches of the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effpass.trainers.pruning.scores import Calibration
from effpass.trainers.pruning.scores.taylor import mask_gradients
from effpass.trainers.pruning.units import Units

__all__ = ["layer_scores"]

# Families that make up a layer: query heads and experts are parts of others.
_PARTS = ("kv_groups", "ffn_channels", "expert_channels", "shared_channels")


def layer_scores(model: Any, units: Mapping[str, Units], calibration: Calibration) -> Tensor:
    """float32 `[layers]`, larger for what matters more."""
    total = torch.zeros(model.config.get_text_config().num_hidden_layers)
    for gradients in mask_gradients(model, {f: u for f, u in units.items() if f in _PARTS}, calibration):
        sums = torch.zeros_like(total)
        for family, gradient in gradients.items():
            for layer, value in zip(units[family].readers, gradient.sum((1, 2)).tolist(), strict=True):
                sums[layer] += value
        total += sums.square() / len(calibration.batches)
    return total
