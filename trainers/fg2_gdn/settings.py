"""Settings of a conversion to linear attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from effpass.core.errors import EffpassError, did_you_mean
from effpass.runtime.linear_attention.settings import Mode
from effpass.trainers.lm.config import OptimizerConfig
from effpass.trainers.pruning.distillation import Distillation

__all__ = ["MODES", "STAGES", "Settings", "Stage"]

Stage = Literal["align", "distill", "whole"]

STAGES: tuple[Stage, ...] = get_args(Stage)
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class Settings:
    """Settings of a conversion, which has three stages.

    In *align*, each new layer learns to compute the output of the attention that it replaces from the same inputs in
    the whole model; its output projection is fitted in closed form at the beginning and at the end. In *distill*, the
    new layers learn the logits of the whole model as layers of the hybrid, the model with the new layers in place. In
    *whole*, all parameters of the hybrid do.

    Attributes:
        optimizer: optimizer of the new layers, with its learning rate.
        mode: form of the new layers.
        layers: indices of the layers to replace; None for `share` of them, evenly spread.
        share: share of the layers to replace if `layers` is None.
        steps: total number of optimizer steps of all stages.
        align: share of the steps for the stage *align*.
        whole: share of the steps for the stage *whole*.
        whole_rate: learning rate of the stage *whole*, relative to that of `optimizer`.
        distillation: loss of the stages after *align*.
        batch: number of sequences per optimizer step.
        accumulate: number of micro-batches per optimizer step.
        sequence_length: number of tokens per sequence.
        warmup: number of steps of linear learning rate warm-up in each stage.
        conv_kernel_size, gate_rank, beta_rank, lower_bound: see
            :class:`~effpass.runtime.linear_attention.settings.GatedDeltaSettings`.
        dtype: dtype of computation; trained parameters are float32 in either case.
        seed: seed of the new weights and of the order of the data.
        log_every, save_every: number of steps between log lines and between checkpoints; 0 for no checkpoints.
    """

    optimizer: OptimizerConfig
    mode: Mode = "fg2+"
    layers: tuple[int, ...] | None = None
    share: float = 0.5
    steps: int = 1000
    align: float = 0.3
    whole: float = 0.2
    whole_rate: float = 0.1
    distillation: Distillation = field(default_factory=lambda: Distillation(task=0.5, logits=1.0, hidden=0.0))
    batch: int = 16
    accumulate: int = 1
    sequence_length: int = 512
    warmup: int = 10
    conv_kernel_size: int = 4
    gate_rank: int = 64
    beta_rank: int = 0
    lower_bound: float | None = -5.0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    seed: int = 0
    log_every: int = 10
    save_every: int = 100

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise EffpassError(f"mode: got {self.mode!r}{did_you_mean(str(self.mode), MODES)}")
        if self.layers is None and not 0 < self.share <= 1:
            raise EffpassError(f"share: got {self.share}, expected more than 0 and at most 1")
        for name in ("align", "whole"):
            if not 0 <= getattr(self, name) <= 1:
                raise EffpassError(f"{name}: got {getattr(self, name)}, expected a share from 0 to 1")
        if self.align + self.whole > 1:
            raise EffpassError(f"align and whole take {self.align + self.whole:g} of the steps", hint="1 at most")
        if not 0 < self.whole_rate < float("inf"):
            raise EffpassError(f"whole_rate: got {self.whole_rate}, expected more than 0")
        for name, least in (("steps", 1), ("batch", 1), ("accumulate", 1), ("sequence_length", 2), ("log_every", 1),
                            ("save_every", 0), ("warmup", 0), ("seed", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise EffpassError(f"{name}: got {getattr(self, name)}, expected {least} at least")
        if self.batch % self.accumulate:
            raise EffpassError(f"batch: {self.batch} rows can't be cut into {self.accumulate} micro-batches")

    def steps_of(self, stage: Stage) -> int:
        """Return the number of steps of a stage."""
        align, whole = round(self.steps * self.align), round(self.steps * self.whole)
        return {"align": align, "distill": self.steps - align - whole, "whole": whole}[stage]

    def first_of(self, stage: Stage) -> int:
        """Return the number of steps before a stage."""
        return sum(self.steps_of(s) for s in STAGES[: STAGES.index(stage)])
