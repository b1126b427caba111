"""The loop before the cut, with masks, and after it, without."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from effpass.trainers.finetune.trained import AdapterTrainer, Trained
from effpass.trainers.lm.config import OptimizerConfig, Schedule
from effpass.trainers.loop import Loop
from effpass.trainers.pruning.data import Rows
from effpass.trainers.pruning.distillation import Distillation
from effpass.trainers.pruning.minimax import Minimax
from effpass.trainers.run_folder import Recorder

__all__ = ["Distiller", "OffsetRecorder", "mean_loss", "training_arguments"]

_TENSORS, _PLAIN = "masks.safetensors", "masks.json"


def training_arguments(settings: Any, steps: int, folder: Path) -> TrainingArguments:
    """What the Trainer is told."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        gradient_accumulation_steps=settings.accumulate,
        max_grad_norm=settings.optimizer.clip,
        bf16=settings.dtype == "bfloat16",
        seed=settings.seed,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,  # it waits for the device at every micro-batch
        eval_strategy="no",
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 500,
        save_total_limit=2,
        ignore_data_skip=True,  # our loader begins where the checkpoint ended
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )


class OffsetRecorder(Recorder):
    """Counts the steps of a second loop on from those of the first."""

    def __init__(self, first: int, *args: Any) -> None:
        super().__init__(*args)
        self.first = first

    def write(self, step: int, metrics: dict[str, float]) -> None:
        super().write(self.first + step, metrics)


class Distiller(AdapterTrainer, Loop):
    """Trains a student by a teacher, and masks on the student where there are any.

    Args:
        trained: the student and its adapter.
        teacher: the whole model.
        distillation: the loss.
        args: of :func:`training_arguments`.
        rows: micro-batches.
        first_step: how many steps are done already.
        optimizer, schedule: of the weights.
        recorder: of metrics.
        learner: of masks; attached to the student.
    """

    most_workers = 0  # rows are cut in less time than it takes to queue a step

    def __init__(
        self,
        trained: Trained,
        teacher: nn.Module,
        distillation: Distillation,
        args: TrainingArguments,
        rows: Rows,
        first_step: int,
        optimizer: OptimizerConfig,
        schedule: Schedule,
        recorder: Recorder,
        learner: Minimax | None = None,
    ) -> None:
        self.trained = trained
        self.teacher, self.distillation, self.learner = teacher, distillation, learner
        super().__init__(trained.model, args, rows, first_step, optimizer, schedule, recorder)
        for callback in [*trained.callbacks(), *([_Learn(learner)] if learner is not None else [])]:
            self.add_callback(callback)
        self._parts: dict[str, Tensor] = {}
        self._count = 0

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        if self.learner is not None:
            self.learner.masks.refresh()
        with self.accelerator.autocast():  # heads too: accelerate wraps the model's own forward alone
            loss, parts = self.distillation.loss(model, self.teacher, inputs["input_ids"])
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0) + value
        self._count += 1
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer; then the model's forward is its own again, without autocast and casts to float32."""
        done = super().train(*args, **kwargs)
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return done

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._count:
            logs |= {f"loss_{name}": float(value) / self._count for name, value in self._parts.items()}
            self._parts, self._count = {}, 0
            if self.learner is not None:
                logs |= self.learner.metrics()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.learner is not None:
            folder = Path(output_dir or str(self.args.output_dir))
            tensors, plain = self.learner.state_dict()
            save_file({name: t.contiguous() for name, t in tensors.items()}, folder / _TENSORS)
            (folder / _PLAIN).write_text(json.dumps(plain))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.learner is not None:
            folder = Path(resume_from_checkpoint)
            self.learner.load_state_dict(load_file(folder / _TENSORS), json.loads((folder / _PLAIN).read_text()))


class _Learn(TrainerCallback):
    """Masks, sizes and multipliers move after the weights, before the gradients go."""

    def __init__(self, learner: Minimax) -> None:
        self.learner = learner

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.learner.step()


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[Tensor]) -> float:
    """Cross entropy of a token, in nats, over batches of ids `[B, T]`."""
    was_training = model.training
    model.eval()
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for ids in batches]
    model.train(was_training)
    return float(torch.stack(losses).double().mean())
