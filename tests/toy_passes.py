"""Passes for tests: the smallest thing of each kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from effpass.core import registry
from effpass.core.pass_ import GraphPass, Match, RuntimePass, WeightsPass
from effpass.core.program import Program
from effpass.core.report import Refusal


class Touch(GraphPass):
    """Rewrites nothing and counts one hit per program: the retraced graph is what runs."""

    name = "touch"
    exact = False  # so that it runs only where a test names it

    def find(self, program: Program) -> Iterator[Match | Refusal]:
        if program.parent is None:
            yield Match(next(iter(program.graph.nodes)), {})

    def rewrite(self, program: Program, match: Match) -> None:
        return None


class TouchSteps(Touch):
    """The same in programs of one token a sequence."""

    name = "touch_steps"

    def find(self, program: Program) -> Iterator[Match | Refusal]:
        inputs = program.graph.find_nodes(op="placeholder")
        ids = next(n for n in inputs if getattr(n.meta["val"], "dtype", None) == torch.int64)
        if ids.meta["val"].shape[-1] == 1:
            yield from super().find(program)
        else:
            yield Refusal(ids.name, "more than one token", "")


@dataclass(frozen=True)
class ScaleOptions:
    factor: float = 2.0
    only: str = "q_proj"


class Scale(WeightsPass):
    """Multiplies chosen weights by a factor: the smallest derived weight."""

    name = "scale"
    exact = False
    Options = ScaleOptions

    def find(self, program: Program) -> Iterator[Match | Refusal]:
        for linear in program.linears():
            if linear.name is None:
                continue
            if self.options.only in linear.name:
                yield Match(linear.node, {"linear": linear})
            else:
                yield Refusal(linear.name, "not selected", "name it in `only`")

    def rewrite(self, program: Program, match: Match) -> None:
        linear = match.nodes["linear"]
        factor = self.options.factor
        name = program.weight_of(linear.weight).name
        linear.replace_weight(program.derive(f"scale:{factor}:{name}", [linear.weight], lambda w: w * factor))


class NeedsCache(RuntimePass):
    """A runtime pass: has only a model stage."""

    name = "needs_cache"
    exact = False

    def prepare(self, model: torch.nn.Module) -> tuple[int, list[Refusal]]:
        model.config.touched = True
        return 1, []

    def note_on_cache(self, cache: Any, batch: int) -> str:
        return f"nothing for {len(cache.layers)} layers"


TOYS = {cls.name: f"toy_passes:{cls.__name__}" for cls in (Touch, TouchSteps, Scale, NeedsCache)}


def register() -> None:
    """Make the toy passes known by name, as if a distribution provided them."""
    registry.BUILTIN.update(TOYS)
