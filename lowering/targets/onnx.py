"""ONNX: an exported program as a file, checked with onnxruntime before anyone can see it.

The file says where it comes from: its metadata holds the effpass version, the recipe, the tolerance and what was
measured (keys ``effpass.*``).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from effpass.core.errors import ExportError, PassRefusedError
from effpass.core.exported import program_from_exported, to_exported
from effpass.core.manager import PassManager, Planned
from effpass.core.report import Report
from effpass.lowering.targets.decode_graph import DecodeGraph, Step, check_exportable, export_decode_graph
from effpass.lowering.targets.validation import (
    TOLERANCE,
    Check,
    DecodeCase,
    Recording,
    compare,
    decode_cases,
    record_model,
    record_step,
    require_ok,
)

if TYPE_CHECKING:
    from effpass.core.recipe import Recipe

__all__ = [
    "ExportedDecoder",
    "check_output",
    "export_decoder",
    "export_onnx",
    "onnx_step",
    "require_packages",
    "validate_onnx",
]

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ExportedDecoder:
    """What :func:`export_decoder` made.

    Attributes:
        path: the .onnx file; weights over 2 GB stand beside it in ``{path}.data``.
        size: bytes of all its files.
        checks: one entry per case.
        reports: what the passes did, on the model and on the program.
    """

    path: Path
    size: int
    checks: list[Check]
    reports: list[Report]

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "size": self.size,
            "checks": [check.to_json() for check in self.checks],
            "reports": [asdict(report) for report in self.reports],
        }


def require_packages() -> None:
    """Raise an :class:`ExportError` when a package that the export needs is missing."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"exporting to ONNX needs {' and '.join(missing)}, not installed here", hint="pip install 'effpass[onnx]'"
        )


def check_output(path: Path, *, overwrite: bool = False) -> None:
    """Raise an :class:`ExportError` unless `path` can be written. Its folder is made where it is missing."""
    if path.is_dir():
        raise ExportError(f"{path} is a folder", hint=f"name the file: {path / 'model.onnx'}")
    if path.suffix != ".onnx":
        raise ExportError(f"{path} does not end in .onnx", hint=f"use {path.with_suffix('.onnx')}")
    there = [p for p in (path, data_file(path)) if p.exists()]
    if there and not overwrite:
        raise ExportError(f"{there[0]} exists", hint="choose another file, or pass overwrite (--overwrite)")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=path.parent).cleanup()
    except OSError as error:
        raise ExportError(
            f"the folder {path.parent} can't be written: {error.strerror}", hint="choose a folder that you can write"
        ) from error


def export_decoder(
    model: Any,
    recipe: Recipe | None,
    planned: Sequence[Planned],
    out: Path,
    *,
    overwrite: bool = False,
    external_data: bool | None = None,
    progress: Progress | None = None,
) -> ExportedDecoder:
    """Rewrite `model`, export it with its cache (:mod:`effpass.lowering.targets.decode_graph`) and validate the file.

    Args:
        model: a transformers causal LM or PeftModel in `eval()` mode on the CPU. Passes with a first hand change it in
            place, after every check that can be made beforehand.
        recipe: what `planned` was built from; its text goes into the file.
        planned: the passes.
        out: the .onnx file to write; nothing appears there unless it validates.
        overwrite: replace an existing file.
        external_data: weights in a file of their own, ``{out}.data``. Default: from 2 GB on.
        progress: called with one line at the start of each step.

    Raises:
        ExportError: missing packages, an output that can't be written, a model that can't be captured or translated,
            or a file out of tolerance.
        EffpassError: a pass can't act.
    """
    say = progress or (lambda line: None)
    out = Path(out).absolute()
    require_packages()
    check_output(out, overwrite=overwrite)
    check_exportable(model)
    if model.dtype not in TOLERANCE:
        raise ExportError(
            f"{type(model).__name__} is in {model.dtype}, which onnxruntime's CPU kernels lack",
            hint="load it in float32",
        )
    first = [p for p in planned if p.pass_.has_first_hand]
    second = [p for p in planned if not p.pass_.has_first_hand]
    for p in second:
        if "program" not in p.pass_.entrances or not p.pass_.has_second_hand:
            raise PassRefusedError(
                f"{p.pass_.name} can't act on an exported program", hint="leave it out of the recipe"
            )
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
    rewritten = record_step(graph.module(), graph.layers, graph.dtype, cases)
    exact = all(p.pass_.keeps_outputs for p in planned)
    checks: list[Check] = []

    def check(file: Path) -> dict[str, str]:
        say("checking with onnxruntime")
        checks.extend(validate_onnx(file, graph, cases, rewritten, original))
        require_ok(checks, out.name)
        if exact:
            _require_no_method_loss(checks, out.name)
        return {"effpass.validation": json.dumps([c.to_json() for c in checks])}

    say("translating to ONNX")
    export_onnx(
        graph.program,
        out,
        input_names=graph.input_names,
        output_names=graph.output_names,
        axes=graph.axes,
        metadata=_provenance(recipe, graph.dtype),
        overwrite=overwrite,
        external_data=external_data,
        check=check,
    )
    size = sum(p.stat().st_size for p in (out, data_file(out)) if p.exists())
    return ExportedDecoder(out, size, checks, reports)


def export_onnx(
    program: ExportedProgram,
    path: Path,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    axes: Mapping[str, Mapping[int, str]] | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    external_data: bool | None = None,
    check: Callable[[Path], Mapping[str, str]] | None = None,
) -> None:
    """Write `program` as an ONNX file, whole or not at all.

    Args:
        program: from ``torch.export``, rewritten or not, not decomposed.
        path: the .onnx file.
        input_names: names of the user inputs, in order; default: the program's.
        output_names: names of the outputs, in order; default: the program's.
        axes: input name → dimension → name; the names replace the program's symbols everywhere.
        metadata: written into the file.
        overwrite: replace an existing file.
        external_data: weights in ``{path}.data``. Default: from 2 GB on.
        check: called with the finished file before it appears at `path`. What it returns is added to the metadata;
            what it raises leaves no file.

    Raises:
        ExportError: an operator has no ONNX translation (names operator and node), or `path` can't be written.
    """
    path = Path(path).absolute()
    require_packages()
    check_output(path, overwrite=overwrite)
    from effpass.lowering.targets import onnx_file
    from effpass.lowering.targets.onnx_translate import translate

    model = translate(program, input_names, output_names, axes or {})
    model.metadata_props.update(metadata or {})
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.stem}.", suffix=".tmp", dir=path.parent))
    try:
        file = temporary / path.name
        onnx_file.save(model, file, data_file(file), external_data=external_data)
        if check is not None:
            onnx_file.append_metadata(file, check(file))
        # The data first: an .onnx file never stands without what it refers to.
        beside = data_file(file).exists()
        if beside:
            os.replace(data_file(file), data_file(path))
        os.replace(file, path)
        if not beside:
            data_file(path).unlink(missing_ok=True)  # of the file that was replaced
    except OSError as error:
        raise ExportError(
            f"{path} can't be written: {error.strerror}", hint="free room, or choose another disk"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def validate_onnx(
    path: Path,
    graph: DecodeGraph,
    cases: Sequence[DecodeCase],
    rewritten: Sequence[Recording],
    original: Sequence[Recording],
) -> list[Check]:
    """Run the file with onnxruntime on the CPU and compare.

    Args:
        path: the .onnx file of `graph`.
        graph: for the shapes of the cache.
        cases: what to run.
        rewritten: recordings of the rewritten program (export error).
        original: recordings of the original model (method loss).
    """
    step = onnx_step(path)
    try:
        exported = record_step(step, graph.layers, graph.dtype, cases)
    except Exception as error:  # onnxruntime's errors share no base class
        raise ExportError(f"onnxruntime can't run {path.name}: {' '.join(str(error).split())}") from error
    return compare(cases, exported, rewritten, original, graph.dtype)


def onnx_step(path: Path) -> Step:
    """An exported decoder as a function of tensors: ``(input_ids, attention_mask, position_ids, *past) -> outputs``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} can't load {path.name}: {' '.join(str(error).split())}"
        ) from error
    names = [i.name for i in session.get_inputs()]

    def step(*inputs: Tensor) -> list[Tensor]:
        feeds = {name: t.contiguous().numpy() for name, t in zip(names, inputs, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feeds)]

    return step


def _require_no_method_loss(checks: Sequence[Check], what: str) -> None:
    """Exact passes promise the same model up to rounding, and so does the capture."""
    bad = [c for c in checks if not c.method_loss <= c.tolerance]
    if bad:
        raise ExportError(
            f"{what}: every pass is exact, but in {bad[0].case!r} the rewritten model's logits differ from the "
            f"original's by {bad[0].method_loss:.2g}, {bad[0].tolerance:.2g} is allowed; no file was left behind",
            hint="leave passes out of the recipe one by one, and report the one that changes the model",
        )


def _without_peft(model: Any) -> Any:
    """The model inside a PeftModel whose adapters are all merged; otherwise `model`."""
    if not hasattr(model, "get_base_model"):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    return model if any(isinstance(m, BaseTunerLayer) for m in model.modules()) else model.get_base_model()


def _provenance(recipe: Recipe | None, dtype: torch.dtype) -> dict[str, str]:
    from effpass import __version__

    return {
        "effpass.version": __version__,
        "effpass.recipe": "" if recipe is None else recipe.to_yaml(),
        "effpass.tolerance": f"{TOLERANCE[dtype]:g} of the largest logit ({dtype})",
    }


def data_file(path: Path) -> Path:
    """Where the weights of `path` stand when they are not inside it."""
    return path.with_name(f"{path.name}.data")
