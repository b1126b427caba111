"""Settings of the training run of a draft head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from effpass.core.errors import EffpassError
from effpass.trainers.afa_lora.lora import LoraSettings
from effpass.trainers.finetune.settings import Anneal
from effpass.trainers.lm.config import OptimizerConfig, Schedule

__all__ = ["RATE", "Settings"]

RATE = 5e-4  # default learning rate


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Attributes:
        optimizer: optimizer with its learning rate.
        method: what is trained: all weights of the head, or an adapter of an existing head: LoRA or AFA-LoRA
            (:mod:`effpass.trainers.afa_lora`).
        schedule: learning rate schedule.
        steps: number of optimizer steps; None to train for `epochs`.
        epochs: number of passes over the data if `steps` is None.
        batch: number of rows per optimizer step; a row is one sequence of packed texts.
        accumulate: number of micro-batches per step.
        sequence_length: number of tokens per row; None for that of the longest text, rounded up to a multiple of 64.
        vocabulary: number of tokens that the head can propose, the most frequent ones of the data.
        taps: indices of the model's layers whose inputs are the features; None for layers 2, L // 2 and L - 3 of a
            model with L layers, or all layers if there are at most 5.
        unrolled: number of steps S for which the head is unrolled.
        decay: weight of a step in the loss, relative to the step before.
        answers: maximum number of tokens of the answer that the model gives to a prompt; 0 to train on the texts of the
            data.
        temperature: sampling temperature of the answers; 0 for greedy decoding.
        lora: settings of an AFA adapter.
        anneal: activation and annealing of an AFA adapter.
        dtype: dtype of computation and of the model's weights. Trained parameters are float32 in either case.
        seed: seed of the head, the answers and the order of the data.
        log_every, evaluate_every, save_every: number of steps between log lines, evaluations and checkpoints. With 0
            there are evaluations only at the beginning and the end, and no checkpoints.
    """

    optimizer: OptimizerConfig
    method: Literal["full", "lora", "afa-lora"] = "full"
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
            if value is not None and not value >= low:  # also true for NaN
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
