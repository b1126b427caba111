"""Estimate of the device memory that a conversion needs; checked before the run starts."""

from __future__ import annotations

from typing import Any

import torch

from effpass.runtime.linear_attention import GatedDeltaSettings
from effpass.runtime.linear_attention.hybrid import hybrid_config
from effpass.trainers.afa_lora.lora import LoraSettings
from effpass.trainers.fg2_gdn.settings import Settings
from effpass.trainers.fg2_gdn.stages import learners
from effpass.trainers.finetune.memory import estimate as estimate_tuning
from effpass.trainers.lm.model import make_model
from effpass.trainers.lm.optimizers import STATE_BYTES
from effpass.trainers.memory import Estimate

__all__ = ["estimate"]

_FLOAT = 4


def estimate(
    config: Any, settings: Settings, layers: list[int], shape: GatedDeltaSettings, device: torch.device
) -> Estimate:
    """Estimate the device memory of the stage that needs most: the last one that has steps.

    Activations are those of the hybrid with all its logits. The stages compute logits in pieces and need less.
    """
    element = 2 if settings.dtype == "bfloat16" else _FLOAT
    hybrid = hybrid_config(config, layers, shape)
    found = estimate_tuning(
        hybrid, "full", LoraSettings(), settings.optimizer.name, rows=settings.batch // settings.accumulate,
        length=settings.sequence_length, bfloat16=element == 2, device=device,
    )  # fmt: skip
    with torch.device("meta"):
        student: Any = make_model(hybrid, None, 0)
        new_layers = {i: m for i, m in _layers(student).items() if i in layers}
        trained = sum(
            p.numel() for p in learners(student, new_layers, "whole" if settings.steps_of("whole") else "distill")
        )
        total = sum(p.numel() for p in student.parameters())
        teacher = sum(p.numel() for p in make_model(config, None, 0).parameters())
    state = total * _FLOAT + trained * (_FLOAT + STATE_BYTES[settings.optimizer.name]) + teacher * element
    if element == 2:
        state += 2 * total  # copy of the weights that autocast makes
    return Estimate(total, state, found.activations, "", found.available)


def _layers(student: Any) -> dict[int, Any]:
    return {module.layer_idx: module for module in student.modules() if hasattr(module, "cache_layer")}
