"""The Python face: load, prepare, optimize, inspect, generate, export.

model, tokenizer = effpass.load_model("smollm2")
model = effpass.prepare(model, "recipe.yaml")        # an ordinary transformers model, every pass active
model.generate(...)
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from effpass.core import registry
from effpass.core.errors import EffpassError, ModelError, PassRefusedError
from effpass.core.inspection import Inspection, inspect_model
from effpass.core.live_weights import refresh
from effpass.core.manager import PassManager, Planned
from effpass.core.model import LoadedModel, inner_model, load_model
from effpass.core.options import dump_options
from effpass.core.prompt import prompt_inputs
from effpass.core.recipe import Recipe
from effpass.core.report import Report
from effpass.core.roofline import ceilings, device_and_dtype, known
from effpass.core.whole import put_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from effpass.lowering.targets.decode_graph import Step
    from effpass.lowering.targets.export import ExportedDecoder
    from effpass.lowering.targets.validate import Validation

__all__ = [
    "Inspection",
    "LoadedModel",
    "check_export",
    "check_savable",
    "custom_generate",
    "export",
    "generate",
    "inspect",
    "load_exported",
    "load_model",
    "optimize",
    "prepare",
    "read_recipe",
    "refresh",
    "save",
    "swap_adapter",
    "validate",
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
        if info.error is None and info.exact and not info.needs_artifact and info.kind != "runtime"
    ]


def prepare(
    model: torch.nn.Module, recipe: Recipe | str | Path | Mapping[str, Any] | None = None, **compile_options: Any
) -> torch.nn.Module:
    """Make every pass of `recipe` active on `model`; the result is an ordinary transformers model that generates.

    Passes that rewrite models work on `model` in place: weights are folded or sliced once, which is the only way that
    also saves memory. Where a pass only rewrites graphs, the model's calls are compiled with the effpass backend.
    `generate` of the result runs on the decode engine (:mod:`effpass.runtime.engine`).

    Args:
        model: a transformers causal LM, or a PeftModel around one. It is changed in place, after every pass has checked
            that it can act.
        recipe: path, mapping or :class:`Recipe`; None applies every exact pass on weights and graphs that needs no
            artifact.
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
    _attach_engine(prepared, second)
    return prepared


def _attach_engine(prepared: Any, second: list[dict[str, Any]]) -> None:
    from effpass.backend import DecodeBackend
    from effpass.runtime.attach import attach

    runs = inner_model(prepared)  # as PeftModel.generate does
    try:
        attach(runs, backend=DecodeBackend(tuple(second)))
    except ModelError as reason:
        prepared.effpass_report.generates = str(reason)


def _prepare(model: torch.nn.Module, planned: list[Planned]) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """Run the model stage; returns the model to use and the recipe items that are left for the backend."""
    first = [p for p in planned if p.pass_.rewrites_model]
    second = [p for p in planned if not p.pass_.rewrites_model]
    for p in second:
        if "backend" not in p.pass_.entrances:
            raise PassRefusedError(f"{p.pass_.name} rewrites neither models nor graphs of torch.compile")
        p.pass_.check_model(model)
    report = PassManager(first).prepare(model)
    prepared = model.get_base_model() if _is_merged_peft(model) else model  # type: ignore[operator]
    report.compiled = [p.pass_.name for p in second]
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


def inspect(
    model: torch.nn.Module,
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    *,
    input_ids: torch.Tensor | None = None,
    batch: int = 1,
    tokens: int = 512,
    cache_length: int = 1024,
    predict_for: str | None = None,
) -> Inspection:
    """Rewrite one forward of `model` without compiling or changing it: what fires, what does not, what it gains.

    Graphs that `torch.compile` made in this process are dropped, and compiled again when they are next called.

    Args:
        model: a transformers causal LM or PeftModel.
        recipe: as in :func:`prepare`.
        input_ids: token ids `[B, T]` of the prefill; by default its costs are worked out for `batch` x `tokens`.
        batch: sequences, of the prefill and of the decode step.
        tokens: positions of the prefill; 0 leaves it out, which halves the time.
        cache_length: positions of the decode step's key-value cache.
        predict_for: a device whose ceilings are known (``"h100"``). By default those of the model's own device are
            measured, in seconds, and kept in the cache folder.

    Raises:
        EffpassError: a pass can't act on this model, or a size is too small. A required pass that finds
            nothing is no error here, but named in :attr:`Inspection.unmet`.
    """
    for name, value, least in (("batch", batch, 1), ("tokens", tokens, 0), ("cache_length", cache_length, 1)):
        if value < least:
            raise EffpassError(f"{name} is {value}", hint=f"give {least} or more")
    planned = _planned(recipe)
    at = ceilings(*device_and_dtype(model)) if predict_for is None else known(predict_for)
    sizes = {"batch": batch, "tokens": tokens, "cache_length": cache_length}
    return inspect_model(model, planned, at, input_ids=input_ids, **sizes)


def generate(
    model: torch.nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    images: Sequence[Any] = (),
    processor: Any = None,
    **options: Any,
) -> Iterator[str]:
    """Generate text, piece by piece as it comes.

    Args:
        model: a transformers causal LM, prepared or not.
        tokenizer: its tokenizer. A chat template is applied where it has one.
        prompt: the user's text.
        images: PIL's, for a vision-language model; they stand before the text.
        processor: of that model.
        options: passed to the model's `generate` (`max_new_tokens`, `do_sample`, ...).

    Yields:
        Text, in order. The first token's text comes as soon as it is there. Closing the iterator ends the generation.
    """
    from threading import Thread

    from transformers import TextIteratorStreamer

    class Streamer(TextIteratorStreamer):
        closed = False

        def put(self, value: Any) -> None:
            if self.closed:
                raise _ClosedError
            super().put(value)

    inputs = prompt_inputs(tokenizer, prompt, images, processor)
    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []

    def run() -> None:
        try:
            # A thread starts on the first GPU, and kernels are launched on the current one.
            with torch.cuda.device_of(next(model.parameters())), torch.inference_mode():
                model.generate(**inputs.to(model.device), streamer=streamer, **options)  # type: ignore[operator]
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        streamer.closed = True
        thread.join()
    if failure:
        raise failure[0]


class _ClosedError(Exception):
    """Nobody reads on: ends a generation from inside its streamer."""


def custom_generate(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    token_streamer: Any = None,
    draft: Any = None,
    tree: Any = None,
    **model_kwargs: Any,
) -> Any:
    """The decode engine for one call of a model that was not prepared.

    ``model.generate(..., custom_generate=effpass.custom_generate)``

    Args:
        model: a transformers causal LM; its engine is made at the first call, and kept on it.
        input_ids: `[B, T]`, as all else here what transformers' `generate` prepared.
        logits_processor: applied to each step's logits.
        stopping_criteria: end the sequences.
        generation_config: as prepared.
        token_streamer: a streamer; transformers does not pass its own `streamer` on to a custom loop.
        draft: decode speculatively: a model, a folder of one, ``"ngram"`` or ``"layers:0,1,5"``.
        tree: that the draft grows: ``"chain"``, ``"static"``, ``"eagle2"`` or ``"c2t"``.
        model_kwargs: `attention_mask`, `past_key_values`.

    Raises:
        EffpassError: the engine can't run the model, or has no place for an argument.
    """
    from effpass.backend import DecodeBackend
    from effpass.runtime import generation, speculative
    from effpass.runtime.attach import engine_of

    engine = engine_of(model, backend=DecodeBackend())
    prepared = {
        "logits_processor": logits_processor,
        "stopping_criteria": stopping_criteria,
        "generation_config": generation_config,
        "streamer": token_streamer,
        **model_kwargs,
    }
    if draft is None:
        return generation.generate(engine, input_ids, **prepared)
    return speculative.generate(speculative.speculator_of(engine, draft, tree), input_ids, **prepared)


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
        put_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export(
    model: torch.nn.Module,
    recipe: Recipe | str | Path | Mapping[str, Any] | None,
    out: str | Path,
    *,
    target: str = "onnx",
    max_batch: int | None = None,
    max_length: int | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ExportedDecoder:
    """Rewrite `model` by `recipe`, export it, validate the file; a file that does not validate does not stay.

    Weights passes work once on the model itself, which is changed in place; graph passes on the exported program.

    Args:
        model: a transformers causal LM or PeftModel; `eval()` mode, on the CPU. For ``inductor`` and ``aoti`` it may be
            on one GPU, and so is the file's use then.
        recipe: as in :func:`prepare`.
        out: the file to write.
        target: ``"inductor"`` (.safetensors), ``"aoti"`` (.pt2), ``"onnx"`` (.onnx) or ``"tensorrt"`` (.engine).
        max_batch: largest batch that the file must take; default: any, for an engine 1.
        max_length: largest number of positions, past and new together; default: what the model holds, for an engine
            at most 2048, for ONNX any.
        overwrite: replace an existing file.
        progress: called with one line per step.

    Returns:
        The file with its checks: export error and method loss per case.
    """
    from effpass.lowering.targets.export import export_decoder
    from effpass.lowering.targets.target import find_target

    parsed = read_recipe(recipe)
    return export_decoder(
        model,
        parsed,
        _planned(parsed),
        Path(out),
        target=find_target(target),
        max_batch=max_batch,
        max_length=max_length,
        overwrite=overwrite,
        progress=progress,
    )


def check_export(
    model: str,
    out: str | Path,
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    *,
    target: str = "onnx",
    overwrite: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Raise an :class:`EffpassError` when :func:`export` could not write `out`; what can be known before loading.

    Args:
        model: what would be loaded, as in :func:`load_model`; its config tells how much memory the export takes.
        out: as in :func:`export`; so are `recipe`, `target` and `overwrite`.
        device: that the model would be on.
        dtype: as in :func:`load_model`.
        trust_remote_code: as in :func:`load_model`.
    """
    from effpass.core.model import weights_size
    from effpass.lowering.targets.export import check_passes
    from effpass.lowering.targets.gpu import require_current
    from effpass.lowering.targets.host_memory import check_memory
    from effpass.lowering.targets.publish import check_output, check_room
    from effpass.lowering.targets.target import find_target

    found, kind = find_target(target), device.partition(":")[0]
    found.require(kind)
    check_output(Path(out), found, overwrite=overwrite)
    if recipe is not None:
        check_passes(_planned(recipe))
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError):
        return  # loading says what is wrong with the device
    require_current(place)
    on_device = None if kind == "cpu" else {"": device}
    weights = weights_size(model, dtype=dtype, device_map=on_device, trust_remote_code=trust_remote_code)
    if weights is not None:
        check_room(Path(out), weights[0])
        check_memory(found, *weights, place, loaded=False)


def load_exported(path: str | Path, *, allow_native: bool = False) -> Step:
    """An exported file as a function of tensors: ``(input_ids, attention_mask, position_ids, *past) -> outputs``.

    Shapes and names are those of :mod:`effpass.lowering.targets.decode_graph`. The tensors are on the CPU, or on
    PyTorch's current GPU for a file that was exported on one. Sizes outside the file's range, and tensors elsewhere,
    are refused when it is called. A file for a GPU is for one thread at a time; calls can be captured in a CUDA graph.

    Args:
        path: what :func:`export` wrote; an ``inductor`` file is compiled now, which takes seconds to minutes.
        allow_native: run machine code from the file, which ``aoti`` needs. Only for files that you trust.

    Raises:
        ExportError: not an exported file, altered, made for another machine or for a GPU that is not here, or native
            and not allowed.
    """
    from effpass.lowering.targets.validate import open_exported

    return open_exported(Path(path), allow_native=allow_native)[0]


def validate(
    path: str | Path, *, allow_native: bool = False, progress: Callable[[str], None] | None = None
) -> Validation:
    """Check an exported file later, without its model: unaltered to the bit, and right on this machine.

    Args:
        path: what :func:`export` wrote.
        allow_native: as in :func:`load_exported`.
        progress: called with one line per step.

    Returns:
        The differences by case; its `ok` says whether all are within the file's tolerance.

    Raises:
        ExportError: not an exported file, truncated, altered, or native and not allowed.
    """
    from effpass.lowering.targets.validate import validate_file

    return validate_file(Path(path), allow_native=allow_native, progress=progress)


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
