"""Settings of a pruning run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from effpass.core.errors import EffpassError, did_you_mean
from effpass.passes.weights.prunable_units import FAMILIES
from effpass.trainers.afa_lora.lora import LoraSettings
from effpass.trainers.finetune.settings import Anneal
from effpass.trainers.lm.config import OptimizerConfig
from effpass.trainers.pruning.distillation import Distillation

__all__ = ["CHOOSERS", "COSTS", "RATES", "Choosers", "Costs", "Settings"]

Choosers = Literal["minimax", "taylor", "activation", "magnitude", "random", "depth"]
Costs = Literal["parameters", "bytes", "latency"]
CHOOSERS: tuple[Choosers, ...] = ("minimax", "taylor", "activation", "magnitude", "random", "depth")
COSTS: tuple[Costs, ...] = ("parameters", "bytes", "latency")

# Default learning rates by method.
RATES = {"full": 1e-4, "lora": 1e-3, "afa-lora": 1e-3}


@dataclass(frozen=True)
class Settings:
    """Settings of a pruning run.

    Attributes:
        optimizer: optimizer of the weights, with its learning rate.
        keep: share of the cost to keep.
        keep_of: for single families, the share of their units to keep.
        choose: method that chooses the units to keep: `minimax` learns masks, `depth` removes whole layers, and the
            others score units once (:mod:`effpass.trainers.pruning.scores`).
        units: families of units to prune; empty for all that the model has, except query heads.
        cost: what `keep` is a share of: the parameters of the decoder layers, the bytes that a decode step reads, or
            the predicted time of a decode step.
        cost_batch, cost_context: batch size and context length in positions of this decode step.
        multiple: number of which kept channels are a multiple; None for the default of
            :class:`~effpass.trainers.pruning.shapes.Shapes`.
        devices: number of devices that share a layer by tensor parallelism.
        method: what is trained while masks are learned: all weights or a LoRA adapter.
        recovery: what is trained after the cut: all weights, a LoRA adapter, or an adapter with an annealed activation.
        recovery_lr: peak learning rate after the cut; None for that of `optimizer`.
        lora, anneal: settings of the adapters and of the annealing.
        distillation: weights of the loss, before and after the cut.
        steps: total number of optimizer steps before and after the cut.
        learning: share of these steps in which masks are learned; used by `minimax` only.
        batch, accumulate, sequence_length: number of sequences per optimizer step, number of micro-batches per step,
            and number of tokens per sequence.
        calibration: number of micro-batches that the other methods use as calibration data.
        warmup: number of steps of linear learning rate warm-up, both before and after the cut.
        dtype: dtype of computation, of frozen weights, and of the saved model.
        seed: seed of adapters, of the order of the data, and of random scores.
        log_every, save_every: number of steps between log lines and between checkpoints; 0 for no checkpoints.
    """

    optimizer: OptimizerConfig
    keep: float
    keep_of: dict[str, float] = field(default_factory=dict)
    choose: Choosers = "minimax"
    units: tuple[str, ...] = ()
    cost: Costs = "parameters"
    cost_batch: int = 1
    cost_context: int = 1024
    multiple: int | None = None
    devices: int = 1
    method: Literal["full", "lora"] = "full"
    recovery: Literal["full", "lora", "afa-lora"] = "full"
    recovery_lr: float | None = None
    lora: LoraSettings = field(default_factory=LoraSettings)
    anneal: Anneal = field(default_factory=Anneal)
    distillation: Distillation = field(default_factory=Distillation)
    steps: int = 1000
    learning: float = 0.4
    batch: int = 16
    accumulate: int = 1
    sequence_length: int = 512
    calibration: int = 16
    warmup: int = 10
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    log_every: int = 10
    save_every: int = 100

    def __post_init__(self) -> None:
        for name, value in {"keep": self.keep, **{f"keep of {f}": s for f, s in self.keep_of.items()}}.items():
            if not 0 < value < 1:
                raise EffpassError(f"{name}: got {value}, expected a share above 0 and below 1")
        for family in (*self.keep_of, *self.units):
            if family not in FAMILIES:
                raise EffpassError(f"unknown units {family!r}{did_you_mean(family, FAMILIES)}")
        least: dict[str, Any] = {
            "steps": 20, "batch": 1, "accumulate": 1, "sequence_length": 2, "calibration": 1, "cost_batch": 1,
            "cost_context": 1, "devices": 1, "multiple": 1, "warmup": 0, "seed": 0, "log_every": 1, "save_every": 0,
        }  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise EffpassError(f"{name}: got {value}, expected at least {low}")
        if self.batch % self.accumulate:
            raise EffpassError(f"a batch of {self.batch} rows can't be cut into {self.accumulate} micro-batches")
        if self.recovery_lr is not None and not 0 < self.recovery_lr < float("inf"):
            raise EffpassError(f"recovery_lr: got {self.recovery_lr}, expected a positive number")
        if not 0 < self.learning < 1:
            raise EffpassError(f"learning: got {self.learning}, expected a share above 0 and below 1")
        if self.save_every % self.log_every:
            raise EffpassError(
                f"save_every: got {self.save_every}, expected a multiple of log_every ({self.log_every})",
                hint="the losses since the last line are not in a checkpoint",
            )

    @property
    def learning_steps(self) -> int:
        """Number of optimizer steps before the cut."""
        return round(self.learning * self.steps) if self.choose == "minimax" else 0

    @property
    def recovery_steps(self) -> int:
        return self.steps - self.learning_steps
