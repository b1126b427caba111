"""What a conversion is told."""

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
    """A conversion.

    Three stages, one after the other. *align*: each new layer learns what the attention that it replaces makes of its
    inputs in the whole model. *distill*: the new layers learn the model's logits, in the hybrid. *whole*: all of the
    hybrid does.

    Attributes:
        optimizer: which, and its rates; of the new layers.
        mode: form of the layers.
        layers: which are replaced; None for `share` of them, evenly spread.
        share: of the layers, where `layers` is None.
        steps: of all stages together.
        align: share of the steps.
        whole: share of the steps, the last ones.
        whole_rate: learning rate of that stage, as a share of the optimiser's.
        distillation: the loss of the stages after *align*.
        batch: rows of a step.
        accumulate: micro-batches of it.
        sequence_length: tokens of a row.
        warmup: steps of linear growth of the rate, in each stage.
        conv_kernel_size, gate_rank, beta_rank, lower_bound: see
            :class:`~effpass.runtime.linear_attention.settings.GatedDeltaSettings`.
        dtype: of computation; what learns is float32 either way.
        seed: of new weights and of the order of the data.
        log_every, save_every: steps; 0 for no checkpoints.
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
        """How many of the steps are a stage's."""
        align, whole = round(self.steps * self.align), round(self.steps * self.whole)
        return {"align": align, "distill": self.steps - align - whole, "whole": whole}[stage]

    def first_of(self, stage: Stage) -> int:
        """How many steps come before a stage."""
        return sum(self.steps_of(s) for s in STAGES[: STAGES.index(stage)])
