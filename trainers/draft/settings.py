"""What a run for a draft head is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from effpass.core.errors import EffpassError
from effpass.trainers.afa_lora.lora import LoraSettings
from effpass.trainers.finetune.settings import Anneal
from effpass.trainers.lm.config import OptimizerConfig, Schedule

__all__ = ["RATE", "Settings"]

RATE = 5e-4  # the learning rate where none is given


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        optimizer: which, and its rates.
        method: `full`, or `afa-lora` on a head that there is already.
        schedule: of the learning rate.
        steps: optimiser steps; None for those of `epochs`.
        epochs: passes over the data, where `steps` is None.
        batch: rows of an optimiser step, over all processes.
        accumulate: micro-batches that a process runs for one step.
        sequence_length: tokens of a row; None for those of the longest text, in steps of 64.
        vocabulary: tokens that the head proposes: the most frequent ones of the data.
        taps: layers of the model whose inputs are the features; None for the second, the middle and the last but three.
        unrolled: S, steps that the head is run for.
        decay: weight of a step in the loss, relative to the step before.
        answers: tokens of an answer that the model gives to a prompt, at most; 0 to learn from the texts as they are.
        temperature: of these answers; 0 for the best tokens.
        lora, anneal: of an AFA adapter.
        dtype: of computation, and of the model's weights. What learns is float32 either way.
        seed: of the head, the answers and the order of the data.
        log_every, evaluate_every, save_every: steps; 0 for evaluations at the beginning and the end alone, and for no
            checkpoints.
    """

    optimizer: OptimizerConfig
    method: Literal["full", "afa-lora"] = "full"
    schedule: Schedule = field(default_factory=lambda: Schedule(warmup=50))
    steps: int | None = None
    epochs: int = 2
    batch: int = 16
    accumulate: int = 1
    sequence_length: int | None = None
    vocabulary: int = 16384
    taps: tuple[int, ...] | None = None
    unrolled: int = 5
    decay: float = 0.8
    answers: int = 256
    temperature: float = 0.7
    lora: LoraSettings = field(default_factory=LoraSettings)
    anneal: Anneal = field(default_factory=Anneal)
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        least: dict[str, Any] = {"steps": 1, "epochs": 1, "batch": 1, "accumulate": 1, "sequence_length": 8}
        least |= {"vocabulary": 1, "unrolled": 1, "answers": 0, "seed": 0}
        least |= {"log_every": 1, "evaluate_every": 0, "save_every": 0, "temperature": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not value >= low:  # NaN is neither
                raise EffpassError(f"{name}: got {value}, expected at least {low}")
        if not 0 < self.decay <= 1:
            raise EffpassError(f"decay: got {self.decay}, expected a weight from above 0 to 1")
        if self.batch % self.accumulate:
            raise EffpassError(f"a batch of {self.batch} rows can't be cut into {self.accumulate} micro-batches")
        if self.save_every % self.log_every:
            raise EffpassError(
                f"save_every: got {self.save_every}, expected a multiple of log_every ({self.log_every})",
                hint="the losses since the last line are not in a checkpoint",
            )
