"""Scores of whole layers: first-order Taylor scores of everything that a layer adds to the residual stream.

    score = mean over batches of (Σ_u ∂L/∂m_u)²

L is the cross entropy of the data, and m_u is the mask of unit u of the layer, at 1. The sum over the units is the
gradient of a single mask on both branches of the layer, attention and feed-forward.
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

# Families that together make up a layer; query heads and experts consist of units of these.
_PARTS = ("kv_groups", "ffn_channels", "expert_channels", "shared_channels")


def layer_scores(model: Any, units: Mapping[str, Units], calibration: Calibration) -> Tensor:
    """Return the score of each layer, float32 `[layers]`; a higher score means a more important layer."""
    total = torch.zeros(model.config.get_text_config().num_hidden_layers)
    for gradients in mask_gradients(model, {f: u for f, u in units.items() if f in _PARTS}, calibration):
        sums = torch.zeros_like(total)
        for family, gradient in gradients.items():
            for layer, value in zip(units[family].readers, gradient.sum((1, 2)).tolist(), strict=True):
                sums[layer] += value
        total += sums.square() / len(calibration.batches)
    return total
