"""The loop of each stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments

from effpass.trainers.fg2_gdn.alignment import alignment
from effpass.trainers.fg2_gdn.settings import Settings, Stage
from effpass.trainers.lm.config import OptimizerConfig, Schedule
from effpass.trainers.loop import Loop
from effpass.trainers.pruning.data import Rows
from effpass.trainers.run_folder import Recorder

__all__ = ["Converter"]


class Converter(Loop):
    """Trains new layers, or the hybrid, by the whole model.

    Args:
        stage: which loss.
        student: the hybrid.
        layers: its new layers, by number.
        teacher: the whole model.
        settings: of the conversion.
        args: the Trainer's.
        rows: micro-batches.
        first_step: steps of this stage that are done.
        optimizer, schedule: of this stage.
        recorder: of metrics.
    """

    most_workers = 0  # rows are cut in less time than it takes to queue a step

    def __init__(
        self,
        stage: Stage,
        student: nn.Module,
        layers: Mapping[int, nn.Module],
        teacher: nn.Module,
        settings: Settings,
        args: TrainingArguments,
        rows: Rows,
        first_step: int,
        optimizer: OptimizerConfig,
        schedule: Schedule,
        recorder: Recorder,
    ) -> None:
        super().__init__(student, args, rows, first_step, optimizer, schedule, recorder)
        self.stage, self.layers, self.teacher, self.distillation = stage, layers, teacher, settings.distillation
        self._parts: dict[str, Tensor] = {}
        self._count = 0

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        ids = inputs["input_ids"]
        if self.stage == "align":
            return alignment(self.layers, self.teacher, ids)
        loss, parts = self.distillation.loss(model, self.teacher, ids)
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0) + value
        self._count += 1
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._count:
            logs |= {f"loss_{name}": float(value) / self._count for name, value in self._parts.items()}
            self._parts, self._count = {}, 0
        super().log(logs, start_time)
