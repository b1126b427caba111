"""Training loop of all stages of a conversion; :mod:`.stages` runs it."""

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
    """Trainer of the new layers, or of the whole hybrid, which learn from the whole model.

    A hybrid is the model in which some layers have linear attention instead of attention.

    Args:
        stage: stage of the conversion, which determines the loss.
        student: hybrid.
        layers: new layers of the hybrid by layer index.
        teacher: whole model.
        settings: settings of the conversion.
        args: arguments of the Trainer.
        rows: dataset of micro-batches.
        first_step: number of steps of this stage that are done already.
        optimizer, schedule: optimizer and learning rate schedule of this stage.
        recorder: recorder of metrics.
    """

    most_workers = 0  # making a micro-batch takes less time than launching a step

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
