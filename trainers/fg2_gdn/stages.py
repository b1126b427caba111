"""Runs a single stage of a conversion on models in memory; :mod:`.run` calls it for each stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effpass.runtime.linear_attention import GatedDeltaAttention
from effpass.trainers.fg2_gdn.alignment import fit_outputs
from effpass.trainers.fg2_gdn.loop import Converter
from effpass.trainers.fg2_gdn.settings import Settings, Stage
from effpass.trainers.lm.config import Schedule
from effpass.trainers.lm.model import set_experts
from effpass.trainers.pruning.data import Rows
from effpass.trainers.pruning.loop import training_arguments
from effpass.trainers.run_folder import Recorder

__all__ = ["learners", "run_stage"]

_SAMPLES = 64  # tokens by which an output projection is fitted, for each of its inputs


def learners(student: nn.Module, layers: Mapping[int, nn.Module], stage: Stage) -> list[nn.Parameter]:
    """Make the parameters that a stage trains require gradients, and no others.

    Returns:
        The parameters to train.
    """
    student.requires_grad_(stage == "whole")
    for layer in layers.values():
        layer.requires_grad_(True)
    return [p for p in student.parameters() if p.requires_grad]


def run_stage(
    stage: Stage,
    student: Any,
    layers: Mapping[int, nn.Module],
    teacher: Any,
    settings: Settings,
    rows: Rows,
    folder: Path,
    recorder: Recorder,
    *,
    checkpoint: Path | None = None,
    first_step: int = 0,
) -> None:
    """Train the student in place.

    Args:
        stage: stage to run.
        student: hybrid in float32.
        layers: new layers of the hybrid by layer index.
        teacher: whole model, which is not trained.
        settings: settings of the conversion.
        rows: micro-batches of this stage.
        folder: folder for checkpoints.
        recorder: recorder of metrics.
        checkpoint, first_step: checkpoint to resume from, and the number of steps of this stage that are done; None and
            0 to start at the beginning.
    """
    torch.manual_seed(settings.seed)
    learners(student, layers, stage)
    set_experts(student)
    rate = settings.optimizer.lr * (settings.whole_rate if stage == "whole" else 1.0)
    args = training_arguments(settings, settings.steps_of(stage), folder)
    trainer = Converter(
        stage, student, layers, teacher, settings, args, rows, first_step, replace(settings.optimizer, lr=rate),
        Schedule(warmup=min(settings.warmup, settings.steps_of(stage)), kind="cosine", final=0.05), recorder,
    )  # fmt: skip
    linear = {i: layer for i, layer in layers.items() if isinstance(layer, GatedDeltaAttention)}
    if stage == "align" and first_step == 0:
        _fit_outputs(linear, teacher, rows)
    # Not under autocast, which would keep the first copies of the weights for all steps; each step has its own.
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stage == "align":
        _fit_outputs(linear, teacher, rows)
    student.config.use_cache = True  # the Trainer sets it to False
    student.requires_grad_(True).eval()


def _fit_outputs(layers: Mapping[int, GatedDeltaAttention], teacher: Any, rows: Rows) -> None:
    if layers:
        device = next(teacher.parameters()).device
        inputs = max(layer.o_proj.in_features for layer in layers.values())
        count = -(-_SAMPLES * inputs // (rows.size * rows.length))
        fit_outputs(layers, teacher, (ids.to(device) for ids in rows.calibration(count)))
