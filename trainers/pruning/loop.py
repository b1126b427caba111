"""Training loop of a pruning run: before the cut with masks on the student, after the cut without.

:mod:`effpass.trainers.pruning.stages` runs it for both. The loop is a transformers `Trainer` whose loss distils the
teacher (:mod:`effpass.trainers.pruning.distillation`) and whose checkpoints include the state of the mask learner.
"""

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
    """Return the arguments of the Trainer for `steps` optimizer steps with checkpoints in `folder`."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        gradient_accumulation_steps=settings.accumulate,
        max_grad_norm=settings.optimizer.clip,
        bf16=settings.dtype == "bfloat16",
        seed=settings.seed,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,  # the filter would synchronize with the device at every micro-batch
        eval_strategy="no",
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 500,
        save_total_limit=2,
        ignore_data_skip=True,  # the data loader already starts where the checkpoint ended
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )


class OffsetRecorder(Recorder):
    """Recorder that continues the step numbers of a first loop in a second one; `first` is the number of its steps."""

    def __init__(self, first: int, *args: Any) -> None:
        super().__init__(*args)
        self.first = first

    def write(self, step: int, metrics: dict[str, float]) -> None:
        super().write(self.first + step, metrics)


class Distiller(AdapterTrainer, Loop):
    """Trainer of a student by distillation from a teacher, and of the masks on the student if there are any.

    Args:
        trained: student with its adapter, if it has one.
        teacher: the whole model.
        distillation: loss.
        args: arguments from :func:`training_arguments`.
        rows: dataset of micro-batches.
        first_step: number of steps done before.
        optimizer, schedule: optimizer and learning rate schedule of the weights.
        recorder: recorder of metrics.
        learner: learner of masks that are attached to the student; None to train without masks.
    """

    most_workers = 0  # making a micro-batch takes less time than launching a step

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
        loss, parts = self.distillation.loss(model, self.teacher, inputs["input_ids"])
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0) + value
        self._count += 1
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, then restore the model's original forward, without autocast and float32 casts."""
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
    """Calls the learner after the optimizer step and before the gradients are cleared."""

    def __init__(self, learner: Minimax) -> None:
        self.learner = learner

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.learner.step()


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[Tensor]) -> float:
    """Return the mean cross entropy in nats per token over batches of token ids `[B, T]`."""
    was_training = model.training
    model.eval()
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for ids in batches]
    model.train(was_training)
    return float(torch.stack(losses).double().mean())
