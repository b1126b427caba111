"""The Python face: load, prepare, optimize, inspect, generate, export.

model, tokenizer = effpass.load_model("smollm2")
model = effpass.prepare(model, "recipe.yaml")        # an ordinary transformers model, every pass active
model.generate(...)
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from effpass.core import registry
from effpass.core.errors import EffpassError, PassRefusedError
from effpass.core.live_weights import refresh
from effpass.core.manager import PassManager, Planned
from effpass.core.model import LoadedModel, load_model
from effpass.core.options import dump_options
from effpass.core.recipe import Recipe
from effpass.core.report import PassReport, Report

if TYPE_CHECKING:
    from collections.abc import Callable

    from effpass.lowering.targets.onnx import ExportedDecoder

__all__ = [
    "Inspection",
    "LoadedModel",
    "check_export",
    "check_savable",
    "export",
    "generate",
    "inspect",
    "load_model",
    "optimize",
    "prepare",
    "read_recipe",
    "refresh",
    "save",
    "swap_adapter",
]


def read_recipe(recipe: Recipe | str | Path | Mapping[str, Any] | None) -> Recipe | None:
    """A recipe from a file path, a mapping, or as it is."""
    if recipe is None or isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return Recipe.parse(dict(recipe), base=Path.cwd(), source="recipe")
    return Recipe.load(Path(recipe))


def _planned(recipe: Recipe | str | Path | Mapping[str, Any] | None) -> list[Planned]:
    parsed = read_recipe(recipe)
    if parsed is not None:
        return PassManager.from_recipe(parsed).planned
    return [
        Planned(registry.load(info.name)())
        for info in registry.describe()
        if info.error is None and info.exact and not info.needs_artifact
    ]


def prepare(
    model: torch.nn.Module, recipe: Recipe | str | Path | Mapping[str, Any] | None = None, **compile_options: Any
) -> torch.nn.Module:
    """Make every pass of `recipe` active on `model`; the result is an ordinary transformers model that generates.

    First hands work on the model in place: weights are folded or sliced once, which is the only way that also saves
    memory. Where a pass has no first hand the model's calls are compiled with the effpass backend, so that its second
    hand works on the graph.

    Args:
        model: a transformers causal LM, or a PeftModel around one. It is changed in place, after every pass has checked
            that it can act.
        recipe: path, mapping or :class:`Recipe`; None applies every exact pass that needs no artifact.
        compile_options: passed to `torch.compile` where the model is compiled.

    Returns:
        The model to use: the same object, or the plain model inside a PeftModel whose adapters were merged. Its
        ``effpass_report`` attribute is the :class:`Report`.

    Raises:
        EffpassError: a pass can't act; nothing was changed.
    """
    prepared, second = _prepare(model, _planned(recipe))
    if second:
        prepared.compile(backend="effpass", options={"passes": second}, **compile_options)
    return prepared


def _prepare(model: torch.nn.Module, planned: list[Planned]) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """Run the first hands; returns the model to use and the recipe items that are left for the backend."""
    first = [p for p in planned if p.pass_.has_first_hand]
    second = [p for p in planned if not p.pass_.has_first_hand]
    for p in second:
        if "backend" not in p.pass_.entrances:
            raise PassRefusedError(f"{p.pass_.name} has neither a first hand nor a backend entrance")
        p.pass_.check_model(model)
    report = PassManager(first).prepare(model)
    prepared = model.get_base_model() if _is_merged_peft(model) else model  # type: ignore[operator]
    prepared.effpass_report = report
    items = [
        {p.pass_.name: {**dump_options(p.pass_.options), "require": p.require, "verify": p.verify}} for p in second
    ]
    return prepared, items


def _is_merged_peft(model: Any) -> bool:
    """A PeftModel whose adapter layers are all gone."""
    if not hasattr(model, "get_base_model") or model.active_peft_config.is_prompt_learning:
        return False
    from effpass.passes.weights.attached_lora import tuner_layers

    return not tuner_layers(model)


def optimize(
    model: torch.nn.Module,
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    *,
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    inner: str = "inductor",
) -> torch.nn.Module:
    """:func:`prepare`, and compile the model's calls with the effpass backend.

    Args:
        model: as in :func:`prepare`.
        recipe: as in :func:`prepare`.
        mode: an Inductor mode such as ``"reduce-overhead"``.
        dynamic: as in `torch.compile`.
        fullgraph: as in `torch.compile`.
        inner: registered backend that compiles the rewritten graph.
    """
    prepared, second = _prepare(model, _planned(recipe))
    options: dict[str, Any] = {"passes": second, "inner": inner}
    if mode is not None:
        from torch._inductor import list_mode_options

        options["inner_options"] = list_mode_options(mode)  # torch.compile takes a mode or options, not both
    prepared.compile(backend="effpass", options=options, dynamic=dynamic, fullgraph=fullgraph)
    return prepared


@dataclass
class Inspection:
    """What a recipe would do to a model.

    Attributes:
        graphs: number of graphs that Dynamo makes of one forward.
        reports: what each pass did on each graph.
        prepared: what passes that act only through :func:`prepare` are left for it.
        ops_before: operator counts over all graphs.
        ops_after: the same after the passes.
        weight_bytes: bytes of the model's parameters.
        derived_bytes: bytes that derived weights would take beside them under `torch.compile`; 0 through
            :func:`prepare` and in exports.
        unmet: passes that are required and would rewrite nothing.
    """

    graphs: int = 0
    reports: list[Report] = field(default_factory=list)
    prepared: list[PassReport] = field(default_factory=list)
    ops_before: dict[str, int] = field(default_factory=dict)
    ops_after: dict[str, int] = field(default_factory=dict)
    weight_bytes: int = 0
    derived_bytes: int = 0
    unmet: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(
    model: torch.nn.Module,
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    *,
    input_ids: torch.Tensor | None = None,
) -> Inspection:
    """Rewrite one forward of `model` without compiling or changing it, and say what fired and what did not.

    Graphs that `torch.compile` made in this process are dropped, and compiled again when they are next called.

    Args:
        model: a transformers causal LM or PeftModel.
        recipe: as in :func:`prepare`.
        input_ids: token ids `[B, T]` to trace with; 2 x 16 ids by default.

    Raises:
        EffpassError: a pass can't act on this model. A required pass that finds nothing is no error here, but named in
            :attr:`Inspection.unmet`.
    """
    from effpass.core.derived import derived_bytes
    from effpass.core.dynamo import NotRetraceableError, program_from_dynamo

    planned = _planned(recipe)
    here = [p for p in planned if "backend" in p.pass_.entrances and p.pass_.has_second_hand]
    result = Inspection(weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()))
    for p in planned:
        p.pass_.check_model(model)
        if p not in here:
            result.prepared.append(PassReport(p.pass_.name, p.pass_.exact))

    def collect(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        result.graphs += 1
        try:
            program = program_from_dynamo(gm, inputs)
        except NotRetraceableError as reason:
            result.reports.append(Report("backend", unrewritten=str(reason)))
            return gm.forward
        _add(result.ops_before, program.op_counts())
        report = PassManager([Planned(p.pass_) for p in here]).run(program)
        for entry in report.passes:
            entry.derived_bytes = derived_bytes(program.derived, entry.name)
        result.derived_bytes += sum(e.derived_bytes for e in report.passes)
        _add(result.ops_after, program.op_counts())
        result.reports.append(report)
        return gm.forward

    ids = torch.zeros(2, 16, dtype=torch.long) if input_ids is None else input_ids
    ids = ids.to(next(model.parameters()).device)
    training = model.training
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(model.eval(), backend=collect)(input_ids=ids, use_cache=False)
    except torch._dynamo.exc.BackendCompilerFailed as failure:
        if isinstance(failure.inner_exception, EffpassError):
            raise failure.inner_exception from None
        raise
    finally:
        model.train(training)
        torch._dynamo.reset()
    for p in here:
        hits = sum(e.hits for r in result.reports for e in r.passes if e.name == p.pass_.name)
        if p.require and not hits:
            result.unmet.append(p.pass_.name)
    return result


def _add(total: dict[str, int], counts: Mapping[str, int]) -> None:
    for op, count in counts.items():
        total[op] = total.get(op, 0) + count


def generate(model: torch.nn.Module, tokenizer: Any, prompt: str, **options: Any) -> Iterator[str]:
    """Generate text, piece by piece as it comes.

    Args:
        model: a transformers causal LM, prepared or not.
        tokenizer: its tokenizer. A chat template is applied where it has one.
        prompt: the user's text.
        options: passed to the model's `generate` (`max_new_tokens`, `do_sample`, ...).

    Yields:
        Text, in order. The first token's text comes as soon as it is there.
    """
    from threading import Thread

    from transformers import TextIteratorStreamer

    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise EffpassError("the prompt is empty", hint="give at least one token of text")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []

    def run() -> None:
        try:
            with torch.inference_mode():
                model.generate(**inputs.to(model.device), streamer=streamer, **options)  # type: ignore[operator]
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    yield from (piece for piece in streamer if piece)
    thread.join()
    if failure:
        raise failure[0]


def check_savable(recipe: Recipe, folder: str | Path, *, overwrite: bool = False) -> None:
    """Raise an :class:`EffpassError` when :func:`save` could not write what `recipe` makes as a checkpoint.

    Args:
        recipe: its passes must all work on weights.
        folder: where the checkpoint will be; nothing, or with `overwrite` a checkpoint.
        overwrite: replace a checkpoint that is there.
    """
    for step in recipe.steps:
        if registry.load(step.name).kind != "weights":
            raise PassRefusedError(
                f"{step.name} rewrites the graph or the runtime, which a checkpoint can't hold",
                hint="leave it out of this recipe; apply it with torch.compile(backend='effpass') or `effpass export`",
            )
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise EffpassError(f"{folder} exists", hint="choose another folder, or pass overwrite (--overwrite)")
    if folder.exists() and not (folder / "config.json").is_file():
        raise EffpassError(
            f"{folder} is no checkpoint, and only a checkpoint is replaced", hint="choose another folder"
        )


def save(
    model: Any, folder: str | Path, *, recipe: Recipe | None = None, tokenizer: Any = None, overwrite: bool = False
) -> None:
    """Save a prepared model as an ordinary checkpoint, whole or not at all.

    Args:
        model: what :func:`prepare` returned; its `effpass_report` must count a rewrite.
        folder: the checkpoint; its parent folders are made.
        recipe: saved inside as ``effpass.yaml``.
        tokenizer: saved inside.
        overwrite: replace a checkpoint that is there.

    Raises:
        EffpassError: nothing was rewritten, or `folder` is in the way.
    """
    folder = Path(folder).absolute()
    if recipe is not None:
        check_savable(recipe, folder, overwrite=overwrite)
    report: Report | None = getattr(model, "effpass_report", None)
    if report is not None and not report.hits:
        raise EffpassError("no pass changed a weight; nothing to save: " + "; ".join(report.lines()))
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if recipe is not None:
            recipe.save(temporary / "effpass.yaml")
        if folder.exists():
            replaced = folder.with_name(f"{temporary.name}.old")
            os.rename(folder, replaced)
            os.rename(temporary, folder)
            shutil.rmtree(replaced)
        else:
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export(
    model: torch.nn.Module,
    recipe: Recipe | str | Path | Mapping[str, Any] | None,
    out: str | Path,
    *,
    target: str = "onnx",
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ExportedDecoder:
    """Rewrite `model` by `recipe`, export it, validate the file; a file that does not validate does not stay.

    Weights passes work once on the model itself, which is changed in place; graph passes on the exported program.

    Args:
        model: a transformers causal LM or PeftModel; `eval()` mode.
        recipe: as in :func:`prepare`.
        out: the file to write.
        target: ``"onnx"``.
        overwrite: replace an existing file.
        progress: called with one line per step.

    Returns:
        The file with its checks: export error and method loss per case.
    """
    check_export(out, target=target, overwrite=overwrite)
    from effpass.lowering.targets.onnx import export_decoder

    parsed = read_recipe(recipe)
    return export_decoder(model, parsed, _planned(parsed), Path(out), overwrite=overwrite, progress=progress)


def check_export(out: str | Path, *, target: str = "onnx", overwrite: bool = False) -> None:
    """Raise an :class:`EffpassError` when :func:`export` could not write `out`; what can be known without a model."""
    if target != "onnx":
        raise EffpassError(f"target {target!r} can't be exported to; available: onnx", hint="use --target onnx")
    from effpass.lowering.targets.onnx import check_output, require_packages

    require_packages()
    check_output(Path(out), overwrite=overwrite)


def swap_adapter(model: torch.nn.Module, adapter: str | Path) -> int:
    """Replace the adapter that `merge_lora` folds into the compiled `model`, without recompiling.

    Args:
        model: a model compiled with the effpass backend and a recipe with ``merge_lora``.
        adapter: a stock PEFT adapter folder for the same modules; its rank may differ.

    Returns:
        The number of weights that will be recomputed at the next call.

    Raises:
        ArtifactError: the adapter does not fit; the one in place stays.
    """
    from effpass.passes.weights.merge_lora import swap

    return swap(model, Path(adapter))
