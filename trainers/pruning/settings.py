"""What a pruning run is told."""

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

# Learning rates where none is given.
RATES = {"full": 1e-4, "lora": 1e-3, "afa-lora": 1e-3}


@dataclass(frozen=True)
class Settings:
    """A pruning run.

    Attributes:
        optimizer: of the weights, and its rates.
        keep: share of the cost that stays.
        keep_of: shares of single families' units, where they are asked for.
        choose: what says which units stay.
        units: families that are pruned; none for all that the model has, but for query heads.
        cost: what `keep` is a share of: parameters of the decoder's layers, bytes that a decode step reads, or its
            predicted time.
        cost_batch, cost_context: sequences and positions of that step.
        multiple: of kept channels; None for the shapes' own choice.
        devices: that share a layer by tensor parallelism.
        method: what learns while masks do: all weights or a LoRA adapter.
        recovery: what learns afterwards: the same, or an annealed adapter.
        recovery_lr: its largest learning rate; None for that of `optimizer`.
        lora, anneal: of the adapters.
        distillation: of the loss, before and after the cut.
        steps: optimiser steps before and after the cut together.
        learning: share of them that masks are learned for; 0 for other choosers.
        batch, accumulate, sequence_length: rows of an optimiser step, micro-batches of it, tokens of a row.
        calibration: batches that the other choosers look at.
        warmup: steps of linear growth of the learning rate, before and after the cut.
        dtype: of computation, of frozen weights, and of the model that is saved.
        seed: of adapters, masks' order of data, and random units.
        log_every, save_every: steps; 0 for no checkpoints.
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
        """Steps before the cut."""
        return round(self.learning * self.steps) if self.choose == "minimax" else 0

    @property
    def recovery_steps(self) -> int:
        return self.steps - self.learning_steps
