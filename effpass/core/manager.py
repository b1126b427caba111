"""Runs the passes of a recipe, in order, and observes each one from outside.

:class:`PassManager` is used by every entry point of effpass: :func:`effpass.prepare` runs the model stage of the
passes; the `torch.compile` backend and exports run their graph stage. A pass only rewrites. The manager checks that the
passes fit together and fit the model, times them, counts hits (places rewritten), collects refusals (candidates left
alone), verifies the resulting program, and records all this in a :class:`~effpass.core.report.Report`.

Graph dumps go where PyTorch's own tools look: ``TORCH_LOGS="+effpass"`` prints the graph before and after each pass
that rewrote something, and ``TORCH_TRACE`` passes the same text to tlparse.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import torch

from effpass.core import cost
from effpass.core.errors import EffpassError, PassRefusedError, RewriteError
from effpass.core.outputs import output_difference, outputs_of, rounding
from effpass.core.pass_ import Match, Pass
from effpass.core.program import Program, op_counts
from effpass.core.report import PassReport, Refusal, Report
from effpass.core.verify import Snapshot, snapshot, verify

if TYPE_CHECKING:
    from effpass.core.recipe import Recipe

__all__ = ["PassManager", "Planned"]

# Extent of the change that a pass makes (`Pass.changes`), smallest first; a pass must precede those that change more.
_CHANGES = ("values", "sizes", "layers")

log = logging.getLogger("effpass")


@dataclass(frozen=True)
class Planned:
    """A pass together with the settings of its recipe step.

    Attributes:
        pass_: the pass with its options.
        require: raise when the pass rewrites nothing.
        verify: compare the program's outputs before and after the pass, on the inputs that it was traced with.
    """

    pass_: Pass
    require: bool = False
    verify: bool = False


def _check_order(passes: Sequence[Pass]) -> None:
    """Raise a :class:`PassRefusedError` when `passes` can't be combined, or not in this order."""
    for index, pass_ in enumerate(passes):
        if pass_.kind == "weights":
            _check_in_front(pass_, passes[:index])
        pass_.check_beside(passes[:index], passes[index + 1 :])


def _check_in_front(pass_: Pass, before: Sequence[Pass]) -> None:
    """Raise a :class:`PassRefusedError` when the weights pass `pass_` follows a pass that it must precede."""
    for other in before:
        if other.kind == "runtime":
            raise PassRefusedError(
                f"{pass_.name} changes weights after {other.name}, which depends on the model's layers and heads",
                hint=f"put {pass_.name} before {other.name} in the recipe",
            )
        if pass_.changes and other.changes and _CHANGES.index(pass_.changes) < _CHANGES.index(other.changes):
            raise PassRefusedError(
                f"{pass_.name} comes after {other.name}, which changes {other.changes} of the model; the artifact of"
                f" {pass_.name} was learned for the model as it was before",
                hint=f"put {pass_.name} before {other.name} in the recipe",
            )


class PassManager:
    """Runs an ordered list of passes.

    :meth:`prepare` runs their model stage, which changes a model before anything is traced. :meth:`run` runs their
    graph stage, which rewrites the graph of a traced program.

    Args:
        passes: passes in the order in which they run.

    Raises:
        PassRefusedError: the passes can't be combined, or not in this order.
    """

    def __init__(self, passes: Sequence[Pass | Planned]) -> None:
        self.planned = [p if isinstance(p, Planned) else Planned(p) for p in passes]
        _check_order([planned.pass_ for planned in self.planned])

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> PassManager:
        """Create the passes of a recipe and a manager that runs them."""
        built = recipe.build()
        return cls([Planned(p, s.require, s.verify) for p, s in zip(built, recipe.steps, strict=True)])

    # -- model stage ------------------------------------------------------------------------------------------------

    def prepare(self, model: torch.nn.Module) -> Report:
        """Run the model stage of every pass on `model`, in place.

        Nothing is changed until all passes have checked that they can act on `model`.

        Raises:
            PassRefusedError: a pass does not act on models, or one with `require` rewrote nothing.
            EffpassError: a pass can't act on `model`.
        """
        report = Report("model")
        for planned in self.planned:
            if "model" not in planned.pass_.entrances:
                self._refuse_entrance(planned.pass_, "model")
        for planned in self.planned:
            planned.pass_.check_model(model)
        for planned in self.planned:
            pass_ = planned.pass_
            if not pass_.rewrites_model:
                continue
            started = time.perf_counter()
            hits, refusals = pass_.prepare(model)
            entry = PassReport(pass_.name, pass_.exact, hits, refusals, time.perf_counter() - started)
            self._record(planned, entry, report)
        return report

    # -- graph stage ------------------------------------------------------------------------------------------------

    def run(self, program: Program) -> Report:
        """Run the graph stage of every pass on `program`, in place.

        Raises:
            PassRefusedError: a pass can't act at this entrance, or one with `require` rewrote nothing.
            RewriteError: a pass failed, left an invalid program, or claims to be exact and changed the outputs.
        """
        report = Report(program.entrance)
        for planned in self.planned:
            if program.entrance not in planned.pass_.entrances:
                self._refuse_entrance(planned.pass_, program.entrance)
            if not planned.pass_.rewrites_graph:
                raise PassRefusedError(
                    f"{planned.pass_.name} acts on models, and has nothing to do in a traced graph",
                    hint="model = effpass.prepare(model, recipe)",
                )
        for planned in self.planned:
            self._record(planned, self._run_one(planned, program), report)
        return report

    def _run_one(self, planned: Planned, program: Program) -> PassReport:
        pass_ = planned.pass_
        entry = PassReport(pass_.name, pass_.exact)
        outputs = outputs_of(program) if planned.verify else None
        before = _State.of(program)
        started = time.perf_counter()
        with _failures_of(pass_):
            candidates = [list(pass_.find(part)) for part in before.parts]
        entry.seconds = time.perf_counter() - started
        has_match = any(isinstance(c, Match) for found in candidates for c in found)
        cost_before = cost.total(program) if has_match else None  # not needed when nothing matches
        started = time.perf_counter()
        with _failures_of(pass_):
            for part, found in zip(before.parts, candidates, strict=True):
                self._rewrite(pass_, part, found, entry)
            entry.note = pass_.note(program) if entry.hits else ""
        entry.seconds += time.perf_counter() - started
        if entry.hits:
            assert cost_before is not None
            before.verify(pass_.name)
            before.record(program, cost_before, entry)
        if outputs is not None:
            _compare(pass_, outputs, outputs_of(program), entry)
        return entry

    @staticmethod
    def _rewrite(pass_: Pass, program: Program, candidates: Sequence[Match | Refusal], entry: PassReport) -> None:
        for candidate in candidates:
            refusal = candidate if isinstance(candidate, Refusal) else pass_.check(program, candidate)
            if refusal is not None:
                entry.refusals.append(refusal)
                continue
            assert isinstance(candidate, Match)
            pass_.rewrite(program, candidate)
            entry.hits += 1

    # -- both -------------------------------------------------------------------------------------------------------

    @staticmethod
    def _record(planned: Planned, entry: PassReport, report: Report) -> None:
        report.passes.append(entry)
        log.info(entry.line())
        for refusal in entry.refusals:
            log.debug("%s: %s", entry.name, refusal)
        if planned.require and not entry.hits:
            raise PassRefusedError(
                f"{planned.pass_.name} is required and rewrote nothing: {entry.line()}",
                hint="set require: false to go on without it",
            )

    @staticmethod
    def _refuse_entrance(pass_: Pass, entrance: str) -> NoReturn:
        if entrance == "backend" and "model" in pass_.entrances:
            raise PassRefusedError(
                f"{pass_.name} needs effpass.prepare(model, recipe) before torch.compile",
                hint="model = effpass.prepare(model, recipe); then compile and generate as usual",
            )
        raise PassRefusedError(
            f"{pass_.name} can't act on a {entrance}; it acts on: {', '.join(pass_.entrances)}",
            hint="see `effpass passes`",
        )


@dataclass(frozen=True)
class _State:
    """A program before a pass.

    Attributes:
        parts: the program and the bodies of its higher-order operators.
        snapshots: of each part, to verify the result with.
        ops: how often each operator occurs.
        text: readable form for dumps; empty when nobody reads dumps.
    """

    parts: list[Program]
    snapshots: list[Snapshot]
    ops: Counter[str]
    text: str

    @classmethod
    def of(cls, program: Program) -> _State:
        parts = [program, *program.bodies]
        return cls(parts, [snapshot(part) for part in parts], _ops(parts), _readable(program) if _dumping() else "")

    def verify(self, name: str) -> None:
        """Raise a :class:`RewriteError` when the pass `name` left an invalid program."""
        for part, before in zip(self.parts, self.snapshots, strict=True):
            verify(part, before, name)
            part.recompile()

    def record(self, program: Program, cost_before: cost.Cost, entry: PassReport) -> None:
        """Write into `entry` what a pass changed."""
        after, cost_after = _ops(self.parts), cost.total(program)
        names = dict.fromkeys([*after, *self.ops])  # their union, in order
        entry.ops = {op: after[op] - self.ops[op] for op in names if after[op] != self.ops[op]}
        entry.flops = int(cost_after.flops - cost_before.flops)
        entry.weight_bytes = int(cost_after.weight_bytes - cost_before.weight_bytes)
        if _dumping():
            _dump(entry.name, self.text, _readable(program))


@contextmanager
def _failures_of(pass_: Pass) -> Iterator[None]:
    """Turn an unexpected exception of `pass_` into a :class:`RewriteError`."""
    try:
        yield
    except (EffpassError, torch._dynamo.exc.TensorifyScalarRestartAnalysis):
        raise  # the latter is how Dynamo restarts its analysis, not a failure of the pass
    except Exception as error:
        raise RewriteError(
            f"pass {pass_.name} failed: {type(error).__name__}: {error}",
            hint="leave the pass out of the recipe, or report this with TORCH_LOGS='+effpass'",
        ) from error


def _compare(pass_: Pass, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], entry: PassReport) -> None:
    """Record by how much outputs differ; raise a :class:`RewriteError` if an exact pass changed more than rounding."""
    entry.max_difference = 0.0
    for old, new in zip(before, after, strict=True):
        difference = output_difference(old, new)
        entry.max_difference = max(entry.max_difference, difference)
        if pass_.exact and difference > rounding(old):
            raise RewriteError(
                f"pass {pass_.name} says that it is exact, and an output differs by {difference:.2g}",
                hint="leave the pass out of the recipe, or let it say exact = False",
            )


def _ops(parts: Sequence[Program]) -> Counter[str]:
    return sum((op_counts(p.graph) for p in parts), Counter[str]())


def _dumping() -> bool:
    return log.isEnabledFor(logging.DEBUG) or _tracing()


def _tracing() -> bool:
    return bool(torch._logging._internal.trace_log.handlers)


def _readable(program: Program) -> str:
    return program.gm.print_readable(print_output=False, include_stride=False)


def _dump(name: str, before: str, after: str) -> None:
    for when, text in (("before", before), ("after", after)):
        log.debug("%s the pass %s\n%s", when, name, text)
        metadata = {"name": f"effpass_{name}_{when}", "encoding": "string"}
        torch._logging.trace_structured("artifact", partial(dict, metadata), payload_fn=partial(str, text))
