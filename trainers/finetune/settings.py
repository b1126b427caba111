"""Settings of a supervised fine-tuning run."""

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

# Block sizes in keys that the kernels support.
_BLOCKS = (32, 64, 128, 256, 512)

# Default learning rates by method. Updates of MONA and Muon are scaled such that the rates of AdamW suit them.
RATES = {"full": 2e-5, "lora": 2e-4, "afa-lora": 2e-4}


@dataclass(frozen=True)
class Anneal:
    """Activation and annealing of an AFA adapter: see :class:`AnnealSchedule`."""

    activation: str = "relu"
    start: float = 0.0
    end: float = 0.3
    kind: Literal["cosine", "linear"] = "cosine"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise EffpassError(f"unknown activation {self.activation!r}{did_you_mean(self.activation, ACTIVATIONS)}")
        self.schedule(1000)  # raises for values that are invalid in runs of any length

    def schedule(self, steps: int, hold: int = 1) -> AnnealSchedule:
        """Return the schedule of β for a run of `steps` optimizer steps."""
        return AnnealSchedule(steps, self.start, self.end, self.kind, hold)


@dataclass(frozen=True)
class Sparse:
    """Sparse attention to blocks of keys that each token chooses: see :mod:`effpass.lowering.ops.routed_attention`.

    Attributes:
        budget: number of keys that a token attends to, rounded up to whole blocks.
        block: number of keys per block.
        is_balanced: whether budgets change and samples are redistributed such that processes do not wait for each
            other.
        anchor, p: see :class:`~effpass.trainers.balance.tuning.Tuning`.
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
        """Largest budget in keys."""
        return self.tuning.budgets[-1] if self.is_balanced else self.tuning.default

    @property
    def tuning(self) -> Tuning:
        """Rules of the tuning; processes wait for each other once per step, when gradients are reduced."""
        default = -(-self.budget // self.block) * self.block
        return Tuning(budgets_around(self.budget, self.block), default, self.anchor, self.p, waits="step")


@dataclass(frozen=True)
class Settings:
    """Settings of a supervised run.

    Attributes:
        method: what is trained: all weights, a LoRA adapter, or an AFA adapter (:mod:`effpass.trainers.afa_lora`).
        optimizer: optimizer with its learning rate.
        schedule: learning rate schedule.
        steps: number of optimizer steps; None to train for `epochs`.
        epochs: number of passes over the data if `steps` is None.
        batch: number of rows per optimizer step, over all processes; a row is one sequence of packed samples.
        accumulate: number of micro-batches per process and step.
        sequence_length: number of tokens per row; None for that of the longest sample, rounded up to a multiple of 64.
        is_packed: whether a row holds several samples.
        lora: settings of the adapter.
        anneal: activation and annealing of an AFA adapter.
        dtype: dtype of computation, of frozen weights, and of a fully fine-tuned model when it is saved. Trained
            parameters are float32 in either case.
        compile: whether to compile each decoder layer with Inductor.
        sparse: settings of sparse attention; None for the model's own attention.
        context: number of processes that share each micro-batch; more than 1 requires sparse attention.
        seed: seed of the adapter, of dropout and of the order of the data.
        log_every, evaluate_every, save_every: number of steps between log lines, evaluations and checkpoints. With 0
            there are evaluations only at the beginning and the end, and no checkpoints.
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
