"""Learners that differ from minimax in one thing, for comparison only."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effpass.trainers.finetune.trained import make_trained
from effpass.trainers.lm.config import Schedule
from effpass.trainers.pruning.data import Rows
from effpass.trainers.pruning.loop import Distiller, training_arguments
from effpass.trainers.pruning.masks import Masks
from effpass.trainers.pruning.minimax import Minimax
from effpass.trainers.pruning.settings import Settings
from effpass.trainers.pruning.stages import Problem
from effpass.trainers.run_folder import Recorder

__all__ = ["LEARNERS", "FixedMultipliers", "FixedSizes", "NonUniform", "learn_non_uniform"]


class FixedMultipliers(Minimax):
    """No max player: y and z stay where they begin, and the budget is met by rounding alone."""

    def _move_multipliers(self) -> None:
        pass

    def _raise_pressure(self, excess: Mapping[str, float]) -> None:
        pass

    def _pressed(self, name: str, excess: Mapping[str, float]) -> float:
        return self.pressure[name]


class FixedSizes(Minimax):
    """Every kind of unit goes to the same share, as fast as learned sizes may; masks alone are learned."""

    def _move_sizes(self) -> None:
        even = self.shapes.nearest(self.cost, self.keep, dict.fromkeys(self.removed, self.keep), self.keep_of)
        for size, share in self.shapes.share(even).items():
            self.removed[size] = min(self.removed[size] + self.rates.sizes / self.steps, 1 - share)

    def _choose_sizes(self) -> None:
        self.sizes = self.shapes.nearest(
            self.cost, self.keep, dict.fromkeys(self.removed, self.keep), self.keep_of
        )  # fmt: skip


class NonUniform(Minimax):
    """As many units go of all layers together, and from each as many as it may: no config can say that shape."""

    def sets(self, values: Tensor) -> Tensor:
        return values.reshape(1, 1, -1)


LEARNERS: dict[str, type[Minimax]] = {
    "minimax": Minimax,
    "fixed multipliers": FixedMultipliers,
    "fixed sizes": FixedSizes,
    "not uniform": NonUniform,
}


def learn_non_uniform(
    model: Any, teacher: Any, problem: Problem, settings: Settings, rows: Rows, after: Rows, folder: Path
) -> tuple[Any, Masks, dict[str, int]]:
    """Learn, and recover under masks of 0 and 1, since nothing can be cut.

    Args:
        model: a copy of `teacher`.
        rows, after: before and after the model has closed.

    Returns:
        The model, masks to attach, and units kept of each family on average.
    """
    torch.manual_seed(settings.seed)
    trained = make_trained(model, "full", settings.lora, settings.anneal, None)
    masks = Masks(trained.model, problem.units)
    steps = settings.learning_steps
    learner = NonUniform(masks, problem.cost, problem.shapes, settings.keep, steps)
    recorder = Recorder(folder / "metrics.jsonl", settings.steps, lambda line: None, ())
    constant, falling = Schedule(settings.warmup, "constant"), Schedule(settings.warmup, "cosine", 0.05)
    with masks.attached():
        for part, count, rates, learns in (
            (rows, steps, constant, learner), (after, settings.recovery_steps, falling, None),
        ):  # fmt: skip
            args = training_arguments(settings, count, folder / str(count))
            Distiller(
                trained, teacher, settings.distillation, args, part, 0, settings.optimizer, rates, recorder, learns
            ).train()
            with torch.no_grad():
                masks.refresh()  # they don't move any more
    return trained.model.eval(), masks, copy.copy(learner.sizes)
