"""transformers' Trainer over micro-batches that are a function of their number, with our optimisers and metrics."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterator
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
    """The loop.

    Args:
        model: what is trained.
        args: the Trainer's.
        batches: this process's micro-batches, in order.
        first_step: how many steps are done already.
        optimizer: which, and its rates.
        schedule: of the learning rate.
        recorder: of metrics.

    Attributes:
        most_workers: processes that make micro-batches for a GPU, at most.
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
        args._n_gpu = min(1, args.n_gpu)  # or one process would copy the model to every GPU that it sees
        super().__init__(model=model, args=args, train_dataset=batches, eval_dataset=batches)
        self.remove_callback(PrinterCallback)
        self.add_callback(MetricsCallback(recorder))
        self.model_accepts_loss_kwargs = False  # our losses are means over a step: micro-batches count alike
        self.micro_batches = batches
        self.first_step = first_step
        self.optimizer_config = optimizer
        self.rate_schedule = schedule
        # A mixture of experts is told to return its router's loss here, and not by the config that is saved.
        self._balance: float = getattr(model.config, "router_aux_loss_coef", 0.0)
        has_router = "output_router_logits" in inspect.signature(model.forward).parameters
        self.asks_router = {"output_router_logits": True} if has_router else {}

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
            if self.args.fsdp:  # made before the model was sharded, it knows the parameters that were
                assert self.model is not None
                self.optimizer.optimizer = make_optimizer(self.optimizer_config, self.model)  # type: ignore[union-attr]
            factor = rate(self.rate_schedule, num_training_steps)
            self.lr_scheduler = LambdaLR(optimizer or self.create_optimizer(), factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def with_balance(self, loss: Tensor, outputs: Any) -> Tensor:
        """`loss` plus the router's, where the model, called with `asks_router`, has one."""
        balance = getattr(outputs, "aux_loss", None)
        return loss if balance is None else loss + self._balance * balance

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer's estimate would count attention as nothing


class MetricsCallback(TrainerCallback):
    """Hands what the Trainer logs to a recorder, and stops at a loss that is not finite."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # what the last steps lost, however many they are

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            _check_finite(logs["loss"], state.global_step)
        if "loss" in logs or any(key.startswith("eval_") for key in logs):
            self.recorder.write(state.global_step, {key: value for key, value in logs.items() if key != "epoch"})


def _check_finite(loss: float, step: int) -> None:
    """Raise EffpassError for a loss that is not finite."""
    if not math.isfinite(loss):
        raise EffpassError(
            f"the loss is {loss} at step {step}",
            hint="lower the learning rate or lengthen its warm-up; the last checkpoint stays",
        )


def make_loader(batches: Dataset[Any], first: int, workers: int, pin: bool) -> DataLoader[Any]:
    """A loader of the micro-batches from number `first` on; `workers` processes change nothing in what it gives."""
    return DataLoader(
        batches,
        batch_size=None,
        sampler=_From(first, len(batches)),  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator(),  # its own: an iterator draws a seed, which dropout would feel after a resume
        # `fork` shares the data and starts at once; nothing in a worker touches a GPU.
        multiprocessing_context="fork" if workers else None,
    )


class _From(Sampler[int]):
    """The numbers from `first` on. The length is that of all, since the Trainer takes it for that of an epoch."""

    def __init__(self, first: int, total: int) -> None:
        self.first, self.total = first, total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.total))

    def __len__(self) -> int:
        return self.total
