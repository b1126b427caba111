"""What a fine-tuning run is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from effpass.core.errors import EffpassError, did_you_mean
from effpass.trainers.afa_lora.lora import LoraSettings
from effpass.trainers.afa_lora.schedule import AnnealSchedule
from effpass.trainers.afa_lora.variant import ACTIVATIONS
from effpass.trainers.balance.tuning import Anchor, Tuning, budgets_around
from effpass.trainers.lm.config import OptimizerConfig, Schedule

__all__ = ["RATES", "Anneal", "Method", "Settings", "Sparse"]

Method = Literal["full", "lora", "afa-lora"]

# Keys of a block that kernels have.
_BLOCKS = (32, 64, 128, 256, 512)

# Learning rates where none is given. MONA's and Muon's updates are scaled so that AdamW's rates carry over.
RATES = {"full": 2e-5, "lora": 2e-4, "afa-lora": 2e-4}


@dataclass(frozen=True)
class Anneal:
    """The activation of an AFA adapter and when it goes: see :class:`AnnealSchedule`."""

    activation: str = "relu"
    start: float = 0.0
    end: float = 0.3
    kind: Literal["cosine", "linear"] = "cosine"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise EffpassError(f"unknown activation {self.activation!r}{did_you_mean(self.activation, ACTIVATIONS)}")
        self.schedule(1000)  # refuses what no run can have, however long

    def schedule(self, steps: int, hold: int = 1) -> AnnealSchedule:
        return AnnealSchedule(steps, self.start, self.end, self.kind, hold)


@dataclass(frozen=True)
class Sparse:
    """Attention to blocks that tokens choose: see :mod:`effpass.lowering.ops.routed_attention`.

    Attributes:
        budget: keys that a token attends to, rounded up to whole blocks.
        block: keys of a block.
        is_balanced: budgets move, and samples are shared out, so that processes do not wait for each other.
        anchor, p: of :class:`~effpass.trainers.balance.tuning.Tuning`.
    """

    budget: int = 8192
    block: int = 256
    is_balanced: bool = False
    anchor: Anchor = "mean"
    p: float = 0.1

    def __post_init__(self) -> None:
        if self.block not in _BLOCKS:
            raise EffpassError(f"block: got {self.block}, expected one of {', '.join(map(str, _BLOCKS))}")
        self.tuning  # noqa: B018  (checks its values)

    @property
    def most(self) -> int:
        """Keys of the largest budget."""
        return self.tuning.budgets[-1] if self.is_balanced else self.tuning.default

    @property
    def tuning(self) -> Tuning:
        """Gradients are added up once a step, and there the processes wait for each other."""
        default = -(-self.budget // self.block) * self.block
        return Tuning(budgets_around(self.budget, self.block), default, self.anchor, self.p, waits="step")


@dataclass(frozen=True)
class Settings:
    """A supervised run.

    Attributes:
        method: what learns: all weights, a LoRA adapter, or an AFA adapter.
        optimizer: which, and its rates.
        schedule: of the learning rate.
        steps: optimiser steps; None for those of `epochs`.
        epochs: passes over the data, where `steps` is None.
        batch: rows of an optimiser step, over all processes.
        accumulate: micro-batches that a process runs for one step.
        sequence_length: tokens of a row; None for those of the longest sample, in steps of 64.
        is_packed: several samples in a row.
        lora: of the adapter.
        anneal: of an AFA adapter.
        dtype: of computation. What learns is float32 either way; frozen weights, and a fully tuned model when it is
            saved, are of this type.
        compile: compile each decoder layer with Inductor.
        sparse: attention that is sparse; None for the model's own.
        context: processes that share each micro-batch, with sparse attention.
        seed: of the adapter, dropout and the order of the data.
        log_every, evaluate_every, save_every: steps; 0 for evaluations at the beginning and the end alone, and for no
            checkpoints.
    """

    optimizer: OptimizerConfig
    method: Method = "full"
    schedule: Schedule = field(default_factory=lambda: Schedule(warmup=0))
    steps: int | None = None
    epochs: int = 1
    batch: int = 16
    accumulate: int = 1
    sequence_length: int | None = None
    is_packed: bool = True
    lora: LoraSettings = field(default_factory=LoraSettings)
    anneal: Anneal = field(default_factory=Anneal)
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    sparse: Sparse | None = None
    context: int = 1
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        least: dict[str, Any] = {"steps": 1, "epochs": 1, "batch": 1, "accumulate": 1, "sequence_length": 2}
        least |= {"context": 1, "seed": 0, "log_every": 1, "evaluate_every": 0, "save_every": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise EffpassError(f"{name}: got {value}, expected at least {low}")
        if self.batch % self.accumulate:
            raise EffpassError(f"a batch of {self.batch} rows can't be cut into {self.accumulate} micro-batches")
        if self.sparse is not None and self.sparse.is_balanced and not self.is_packed:
            raise EffpassError("balanced micro-batches are packed rows", hint="leave out --no-packing")
        if self.context > 1 and self.sparse is None:
            raise EffpassError(
                f"context: got {self.context}, and the model's own attention sees the tokens of one process alone",
                hint="add --attention sparse, or leave out --context-parallel",
            )
        if self.save_every % self.log_every:
            raise EffpassError(
                f"save_every: got {self.save_every}, expected a multiple of log_every ({self.log_every})",
                hint="the losses since the last line are not in a checkpoint",
            )
