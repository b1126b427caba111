"""The export pipeline from a model to a validated file; it is the same for every target.

:func:`export_decoder`, which ``effpass.export`` calls, performs these steps in order:

1. check everything that can be refused before the model is changed;
2. record the logits of the original model;
3. rewrite the model (model stage of the passes), capture its decode graph, and rewrite the graph (graph stage);
4. record logits and cache of the rewritten graph;
5. write the file, execute it, and compare it with the recordings;
6. store the results and a digest in the file, and move it to its final path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effpass.core.errors import ExportError, PassRefusedError
from effpass.core.exported import program_from_exported, to_exported
from effpass.core.manager import PassManager, Planned
from effpass.core.report import Report
from effpass.lowering.targets.decode_graph import check_exportable, export_decode_graph
from effpass.lowering.targets.device import model_device
from effpass.lowering.targets.gpu import require_current
from effpass.lowering.targets.host_memory import check_memory
from effpass.lowering.targets.limits import Limits, check_limits, limited
from effpass.lowering.targets.manifest import Manifest, reference_of, seal
from effpass.lowering.targets.publish import check_output, check_room, published
from effpass.lowering.targets.target import Target
from effpass.lowering.targets.tolerance import measure_tolerance
from effpass.lowering.targets.validation import (
    Check,
    Tolerance,
    compare,
    decode_cases,
    record_model,
    record_step,
    require_no_method_loss,
    require_ok,
)

if TYPE_CHECKING:
    from effpass.core.recipe import Recipe

__all__ = ["ExportedDecoder", "check_passes", "export_decoder"]

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ExportedDecoder:
    """Result of :func:`export_decoder`.

    Attributes:
        path: path of the file.
        size: size of the file and its companion files in bytes.
        target: name of the target.
        checks: measured errors, one entry per test case.
        tolerance: the differences that the checks allowed, with their derivation.
        executed: whether the file itself was executed; if not, what it was built from was, see `checked_by`.
        checked_by: description of what was executed.
        reports: reports of the passes, first those on the model and then those on the program.
    """

    path: Path
    size: int
    target: str
    checks: list[Check]
    tolerance: Tolerance
    executed: bool
    checked_by: str
    reports: list[Report]

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "size": self.size,
            "target": self.target,
            "checks": [check.to_json() for check in self.checks],
            "tolerance": asdict(self.tolerance),
            "executed": self.executed,
            "checked_by": self.checked_by,
            "reports": [asdict(report) for report in self.reports],
        }


def check_passes(planned: Sequence[Planned]) -> None:
    """Raise a :class:`PassRefusedError` if one of the passes can't take part in an export."""
    for p in planned:
        name, pass_ = p.pass_.name, p.pass_
        if pass_.kind == "runtime":
            raise PassRefusedError(
                f"{name} can't act on an exported program: it is a runtime pass, and acts in a cache or a loop that "
                "effpass owns; a file holds neither",
                hint="leave it out of this recipe; use effpass.prepare(model, recipe) or `effpass generate` with it",
            )
        if pass_.over_ranks:
            raise PassRefusedError(
                f"{name} spreads the model over processes, and a file is for one",
                hint="export in one process, without torchrun",
            )
        if p.verify and not pass_.rewrites_model:
            raise PassRefusedError(
                f"{name} has verify: true, which runs the program on the inputs of a call, and an export has none",
                hint="leave verify out: an export compares the rewritten model with the original anyway (method loss)",
            )
        if not pass_.rewrites_model and ("program" not in pass_.entrances or not pass_.rewrites_graph):
            raise PassRefusedError(
                f"{name} can't act on an exported program; it acts on: {', '.join(pass_.entrances)}",
                hint="leave it out of the recipe",
            )


def export_decoder(
    model: Any,
    recipe: Recipe | None,
    planned: Sequence[Planned],
    out: Path,
    *,
    target: Target,
    max_batch: int | None = None,
    max_length: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportedDecoder:
    """Rewrite `model`, export it with its cache (:mod:`effpass.lowering.targets.decode_graph`) and validate the file.

    Args:
        model: a transformers causal LM or PeftModel in `eval()` mode on the CPU or, for targets that take it, on one
            GPU. Passes that rewrite models change it in place, after every check that can be made beforehand.
        recipe: the recipe that `planned` was built from, whose text is stored in the file; None if there is none.
        planned: the passes to apply, in order.
        out: path of the file to write; nothing appears there unless the file passes its checks.
        target: file format to write.
        max_batch: largest batch size that the file must accept; None for the target's default.
        max_length: largest number of positions, past and new tokens together; None for the model's or the target's.
        overwrite: whether to replace an existing file.
        progress: function that is called with one line at the start of each step; None for no progress.

    Raises:
        ExportError: if this machine lacks something that the export needs, the output can't be written, the model
            can't be captured or lowered or does not support the sizes, or the file is out of tolerance.
        EffpassError: if a pass refuses the model.
    """
    say = progress or (lambda line: None)
    out = Path(out).absolute()
    check_output(out, target, overwrite=overwrite)
    check_passes(planned)
    check_exportable(model)
    device = model_device(model)
    target.require(device.type)
    require_current(device)
    if model.dtype not in target.dtypes:
        known = ", ".join(str(d).removeprefix("torch.") for d in target.dtypes)
        raise ExportError(
            f"{type(model).__name__} is in {model.dtype}, which {target.name} files can't hold or be checked in",
            hint=f"load it in one of: {known}",
        )
    check_limits(model, max_batch, max_length)
    limits = target.limits(model, max_batch, max_length)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    check_room(out, weights)
    check_memory(target, weights, model.dtype, device)
    first = [p for p in planned if p.pass_.rewrites_model]
    second = [p for p in planned if not p.pass_.rewrites_model]
    for p in second:
        p.pass_.check_model(model)

    cases = decode_cases(model.get_input_embeddings().num_embeddings)
    say("running the original model")
    original = record_model(model, cases)
    say("rewriting")
    reports = [PassManager(first).prepare(model)]
    model = _without_peft(model)
    say("capturing the decode graph")
    graph = export_decode_graph(model)
    program = program_from_exported(graph.program)
    reports.append(PassManager(second).run(program))
    graph = replace(graph, program=to_exported(program))
    say("running the rewritten model")
    rewritten = record_step(graph.module(), graph.layers, graph.dtype, cases, device)

    with published(out, target) as file:
        say(f"writing for {target.name}")
        limits = target.write(graph, file, limits)  # before the tolerance: most unsupported graphs fail here
        say("measuring the tolerance")
        tolerance = measure_tolerance(graph, cases, rewritten)
        say(f"checking with {target.checked_by}")
        # No size limits: they are meant for callers, and the test cases may exceed them.
        step = limited(target.load_written(file, device), graph.layers, graph.dtype, Limits(), out.name, device)
        exported = record_step(step, graph.layers, graph.dtype, cases, device)
        del step
        checks = compare(cases, exported, rewritten, original, tolerance)
        require_ok(checks, out.name)
        if all(p.pass_.keeps_outputs for p in planned):
            require_no_method_loss(checks, original, graph.dtype, out.name)
        target.finish(file, limits)
        manifest = Manifest(
            version=_version(),
            target=target.name,
            recipe="" if recipe is None else recipe.to_yaml(),
            dtype=graph.dtype,
            layers=graph.layers,
            device=device.type,
            limits=limits,
            tolerance=tolerance,
            checks=checks,
            executed=target.executes,
            reference=[reference_of(case, recording) for case, recording in zip(cases, rewritten, strict=True)],
            machine=target.machine(device),
        )
        target.stamp(file, seal(manifest.to_metadata(), target.digest(file)))
    size = sum(p.stat().st_size for p in (out, *target.beside(out)) if p.exists())
    return ExportedDecoder(out, size, target.name, checks, tolerance, target.executes, target.checked_by, reports)


def _without_peft(model: Any) -> Any:
    """Return the base model of a PeftModel whose adapters are all merged; otherwise return `model`."""
    if not hasattr(model, "get_base_model"):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    return model if any(isinstance(m, BaseTunerLayer) for m in model.modules()) else model.get_base_model()


def _version() -> str:
    from effpass import __version__

    return __version__
