"""The stages of a conversion, on models in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effpass.trainers.fg2_gdn.loop import Converter
from effpass.trainers.fg2_gdn.settings import Settings, Stage
from effpass.trainers.lm.config import Schedule
from effpass.trainers.lm.model import set_experts
from effpass.trainers.pruning.data import Rows
from effpass.trainers.pruning.loop import training_arguments
from effpass.trainers.run_folder import Recorder

__all__ = ["learners", "run_stage"]


def learners(student: nn.Module, layers: Mapping[int, nn.Module], stage: Stage) -> list[nn.Parameter]:
    """Let what learns in a stage require gradients, and nothing else.

    Returns:
        The parameters that learn.
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
    """Train in place.

    Args:
        stage: which.
        student: the hybrid, float32.
        layers: its new layers, by number.
        teacher: the whole model; does not learn.
        settings: of the conversion.
        rows: of this stage.
        folder: of checkpoints.
        recorder: of metrics.
        checkpoint, first_step: where to go on.
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
    with torch.autocast(args.device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    student.config.use_cache = True  # the Trainer has set it to False
    student.requires_grad_(True).eval()
