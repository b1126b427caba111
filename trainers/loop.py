"""Base class of the training loops: a transformers `Trainer` that reads micro-batches by their index.

All trainers except that of GRPO derive from :class:`Loop`. Its dataset maps the index of a micro-batch to its contents,
so that a resumed run reads the same data as an uninterrupted one. The loop creates the optimizer and the learning rate
schedule from the settings of the run, and records metrics.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from effpass.core.errors import EffpassError
from effpass.trainers.lm.config import OptimizerConfig, Schedule
from effpass.trainers.lm.optimizers import make_optimizer, rate
from effpass.trainers.run_folder import Recorder

__all__ = ["Loop", "MetricsCallback", "make_loader"]


class Loop(Trainer):
    """Trainer that reads micro-batches by index; subclasses define the loss.

    Args:
        model: model to train.
        args: arguments of the Trainer.
        batches: micro-batches of this process, in the order in which they are read.
        first_step: number of optimizer steps that are done already.
        optimizer: name and hyper-parameters of the optimizer.
        schedule: learning rate schedule.
        recorder: recorder of metrics.

    Attributes:
        most_workers: maximum number of data loader workers per process on a GPU; on a CPU there are none.
        asks_router: keyword arguments of the model's forward that make a mixture-of-experts model return its router
            loss; empty for other models.
    """

    most_workers = 14

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        batches: Dataset[Any],
        first_step: int,
        optimizer: OptimizerConfig,
        schedule: Schedule,
        recorder: Recorder,
    ) -> None:
        args._n_gpu = min(1, args.n_gpu)  # otherwise the Trainer copies the model to all visible GPUs (DataParallel)
        super().__init__(model=model, args=args, train_dataset=batches, eval_dataset=batches)
        self.remove_callback(PrinterCallback)
        self.add_callback(MetricsCallback(recorder))
        self.model_accepts_loss_kwargs = False  # the loss of a step is the mean of the losses of its micro-batches
        self.micro_batches = batches
        self.first_step = first_step
        self.optimizer_config = optimizer
        self.rate_schedule = schedule
        # The router loss is requested with an argument, because the config is saved with the model.
        self._balance: float = getattr(model.config, "router_aux_loss_coef", 0.0)
        has_router = "output_router_logits" in inspect.signature(model.forward).parameters
        self.asks_router = {"output_router_logits": True} if has_router else {}

    def compute_loss_context_manager(self) -> ExitStack[bool | None]:
        """Return the autocast of a loss, also of what it computes outside the model's forward.

        On a GPU, the context of the Trainer casts nothing, and accelerate casts only in the forward of a model that it
        has prepared. Evaluations before the first step have none.
        """
        contexts = super().compute_loss_context_manager()
        contexts.enter_context(self.accelerator.autocast())
        return contexts

    def get_train_dataloader(self) -> DataLoader[Any]:
        is_cuda = self.args.device.type == "cuda"
        cores = (os.cpu_count() or 1) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        workers = min(self.most_workers, cores - 2) if is_cuda else 0
        first = self.first_step * self.args.gradient_accumulation_steps
        return make_loader(self.micro_batches, first, max(0, workers), is_cuda)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            assert model is not None
            is_copied = self.args.world_size > 1 and not self.args.fsdp
            replicas = torch.distributed.group.WORLD if is_copied else None
            self.optimizer = make_optimizer(self.optimizer_config, model, replicas)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        if self.lr_scheduler is None:
            if self.args.fsdp:  # the optimizer was created before sharding and refers to the unsharded parameters
                assert self.model is not None
                self.optimizer.optimizer = make_optimizer(self.optimizer_config, self.model)  # type: ignore[union-attr]
            factor = rate(self.rate_schedule, num_training_steps)
            self.lr_scheduler = LambdaLR(optimizer or self.create_optimizer(), factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def with_balance(self, loss: Tensor, outputs: Any) -> Tensor:
        """Return `loss` plus the weighted router loss, if the model returned one (see :attr:`asks_router`)."""
        balance = getattr(outputs, "aux_loss", None)
        return loss if balance is None else loss + self._balance * balance

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer's estimate leaves out attention


class MetricsCallback(TrainerCallback):
    """Forwards the Trainer's log entries to a recorder, and raises an error if the loss is not finite."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # log the last steps even if they are fewer than a logging interval

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            _check_finite(logs["loss"], state.global_step)
        if "loss" in logs or any(key.startswith("eval_") for key in logs):
            self.recorder.write(state.global_step, {key: value for key, value in logs.items() if key != "epoch"})


def _check_finite(loss: float, step: int) -> None:
    """Raise EffpassError if `loss` is not finite."""
    if not math.isfinite(loss):
        raise EffpassError(
            f"the loss is {loss} at step {step}",
            hint="lower the learning rate or lengthen its warm-up; the last checkpoint stays",
        )


def make_loader(batches: Dataset[Any], first: int, workers: int, pin: bool) -> DataLoader[Any]:
    """Return a data loader over the micro-batches from index `first` on.

    Args:
        batches: dataset of micro-batches.
        first: index of the first micro-batch.
        workers: number of worker processes, which has no effect on the data; 0 to load in the main process.
        pin: whether to copy batches to pinned memory.
    """
    return DataLoader(
        batches,
        batch_size=None,
        sampler=_From(first, len(batches)),  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=pin,
        # The iterator draws a seed. Drawn from the global generator, it would change dropout after a resume.
        generator=torch.Generator(),
        # `fork` shares the data with the workers and starts fast; it is safe because workers do not use the GPU.
        multiprocessing_context="fork" if workers else None,
    )


class _From(Sampler[int]):
    """Sampler of the indices from `first` on.

    Its length counts all indices, because the Trainer takes it for the length of an epoch.
    """

    def __init__(self, first: int, total: int) -> None:
        self.first, self.total = first, total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.total))

    def __len__(self) -> int:
        return self.total
