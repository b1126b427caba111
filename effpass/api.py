"""The Python interface of effpass: load, prepare, optimize, inspect, generate, export.

model = effpass.load_model("smollm2").model
model = effpass.prepare(model, "recipe.yaml")        # an ordinary transformers model with every pass of the recipe
model.generate(...)

The functions validate their arguments and call the pass manager (:mod:`effpass.core.manager`), the decode engine
(:mod:`effpass.runtime`) and the export targets (:mod:`effpass.lowering.targets`). The command line is built on them.
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
    """Read a recipe from a path or a mapping; a :class:`Recipe` and None are returned unchanged."""
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
    """Apply every pass of `recipe` to `model`; the result is an ordinary transformers model that can generate.

    Passes that rewrite models change `model` in place: weights are folded or sliced once, which is the only way that
    also saves memory. If there are passes that only rewrite graphs, the forward calls of the model are compiled with
    the effpass backend. `generate` of the result runs on the decode engine (:mod:`effpass.runtime.engine`).

    Args:
        model: a transformers causal LM, or a PeftModel around one. It is changed in place, but not before every pass
            has checked that it can act.
        recipe: path, mapping or :class:`Recipe`. None applies every exact pass on weights and graphs that needs no
            artifact.
        compile_options: options for `torch.compile`, used if the model is compiled.

    Returns:
        The model to use: the same object, or the plain model inside a PeftModel whose adapters were merged. Its
        attribute ``effpass_report`` is the :class:`~effpass.core.report.Report`.

    Raises:
        EffpassError: a pass can't act on `model`, in which case nothing was changed.
    """
    prepared, second = _prepare(model, _planned(recipe))
    if second:
        prepared.compile(backend="effpass", options={"passes": second}, **compile_options)
    _attach_engine(prepared, second)
    return prepared


def _attach_engine(prepared: Any, second: list[dict[str, Any]]) -> None:
    from effpass.backend import DecodeBackend
    from effpass.runtime.attach import attach

    runs = inner_model(prepared)  # PeftModel.generate calls generate of the inner model
    try:
        attach(runs, backend=DecodeBackend(tuple(second)))
    except ModelError as reason:
        prepared.effpass_report.generates = str(reason)


def _prepare(model: torch.nn.Module, planned: list[Planned]) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """Run the model stage of the passes.

    Returns:
        The model to use, and the recipe items of the passes that remain for the backend.
    """
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
    """Whether `model` is a PeftModel that has no adapter layers any more."""
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
    """Apply every pass of `recipe` to `model` and compile its forward calls with the effpass backend.

    The model stage of the passes runs once, in place, as in :func:`prepare`; their graph stage runs when a call is
    compiled. The decode engine is not attached.

    Args:
        model: as in :func:`prepare`.
        recipe: as in :func:`prepare`.
        mode: an Inductor mode such as ``"reduce-overhead"``; None for the default.
        dynamic: as in `torch.compile`.
        fullgraph: as in `torch.compile`.
        inner: name of the registered backend that compiles the rewritten graph.

    Returns:
        The model to use, as in :func:`prepare`.

    Raises:
        EffpassError: a pass can't act on `model`, in which case nothing was changed.
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
    """Report what `recipe` would do to `model` and what it would gain, without compiling or changing the model.

    A prefill and a decode step are traced and rewritten, and their costs are counted before and after each pass. All
    graphs that `torch.compile` made in this process are dropped, and are compiled again at their next call.

    Args:
        model: a transformers causal LM or PeftModel.
        recipe: as in :func:`prepare`.
        input_ids: token ids `[B, T]` of the prefill. None evaluates its costs for `batch` x `tokens`.
        batch: number of sequences of the prefill and of the decode step.
        tokens: number of tokens of each prompt in the prefill; 0 leaves the prefill out, which halves the time.
        cache_length: number of positions in the KV cache of the decode step.
        predict_for: device whose ceilings (attainable FLOP/s and bandwidths) are known, such as ``"h100"``. None
            measures those of the model's own device, which takes seconds, and keeps them in the cache folder.

    Returns:
        The counts, predicted times and reports.

    Raises:
        EffpassError: a pass can't act on this model, or a size is too small. A required pass that finds nothing is not
            an error here, but is listed in :attr:`Inspection.unmet`.
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
    """Generate text and stream it.

    Args:
        model: a transformers causal LM, prepared or not.
        tokenizer: tokenizer of the model. Its chat template, if it has one, is applied to the prompt.
        prompt: text of the user.
        images: PIL images for a vision-language model; they precede the text.
        processor: processor of the vision-language model.
        options: arguments of the model's `generate` (`max_new_tokens`, `do_sample`, ...).

    Yields:
        Pieces of the text in order, while it is being generated. Closing the iterator ends the generation.
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
            # A new thread has the first GPU as its current device, and kernels are launched on the current device.
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
    """Raised inside the streamer to end a generation whose iterator was closed."""


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
    """Run one `generate` call of a model that was not prepared on the decode engine.

    Usage: ``model.generate(..., custom_generate=effpass.custom_generate)``. transformers prepares the arguments and
    calls this function instead of its own loop.

    Args:
        model: a transformers causal LM. Its engine is created at the first call and kept on the model.
        input_ids: token ids `[B, T]`, as prepared by transformers' `generate`.
        logits_processor: prepared logits processors, applied to the logits of each step.
        stopping_criteria: prepared stopping criteria.
        generation_config: prepared generation config.
        token_streamer: a streamer; transformers does not forward its argument `streamer` to a custom loop.
        draft: draft for speculative decoding: a model, the folder of one, ``"ngram"`` or ``"layers:0,1,5"``. None
            decodes without a draft.
        tree: token tree that the draft builds: ``"chain"``, ``"static"``, ``"eagle2"`` or ``"c2t"``.
        model_kwargs: prepared arguments of the model: `attention_mask`, `past_key_values`.

    Returns:
        What transformers' `generate` returns for the same arguments.

    Raises:
        EffpassError: the engine can't run the model, or does not support an argument.
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
    """Check that :func:`save` can write a model prepared with `recipe` as a checkpoint.

    Args:
        recipe: recipe whose passes must all work on weights.
        folder: folder of the checkpoint. It must not exist, or with `overwrite` be a checkpoint.
        overwrite: replace an existing checkpoint.

    Raises:
        EffpassError: a pass does not work on weights, or `folder` can't be written.
    """
    for step in recipe.steps:
        if registry.load(step.name).kind != "weights":
            raise PassRefusedError(
                f"{step.name} rewrites the graph or the runtime, which a checkpoint can't hold",
                hint="leave it out of this recipe; apply it with torch.compile(backend='effpass') or `effpass export`",
            )
    _check_place(Path(folder), overwrite)


def _check_place(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not overwrite:
        raise EffpassError(f"{folder} exists", hint="choose another folder, or pass overwrite (--overwrite)")
    if folder.exists() and not (folder / "config.json").is_file():
        raise EffpassError(
            f"{folder} is no checkpoint, and only a checkpoint is replaced", hint="choose another folder"
        )


def save(
    model: Any, folder: str | Path, *, recipe: Recipe | None = None, tokenizer: Any = None, overwrite: bool = False
) -> None:
    """Save a prepared model as an ordinary checkpoint, atomically.

    Args:
        model: model returned by :func:`prepare`. Its `effpass_report`, if it has one, must count at least one rewrite.
        folder: folder of the checkpoint; parent folders are created.
        recipe: recipe to save in the folder as ``effpass.yaml``; None saves none.
        tokenizer: tokenizer to save in the folder; None saves none.
        overwrite: replace an existing checkpoint.

    Raises:
        EffpassError: nothing was rewritten, `recipe` is not one that a checkpoint can hold, or `folder` exists and is
            not to be replaced.
    """
    folder = Path(folder).absolute()
    if recipe is not None:
        check_savable(recipe, folder, overwrite=overwrite)
    else:
        _check_place(folder, overwrite)
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
    """Rewrite `model` with `recipe`, export it to a file, and validate the file.

    Weights passes act on the model itself, which is changed in place; graph passes act on the exported program. A file
    that fails validation is removed.

    Args:
        model: a transformers causal LM or PeftModel in `eval()` mode, on the CPU. For ``inductor`` and ``aoti`` it may
            be on one GPU, and the file then runs on a GPU.
        recipe: as in :func:`prepare`.
        out: path of the file to write.
        target: ``"inductor"`` (.safetensors), ``"aoti"`` (.pt2), ``"onnx"`` (.onnx) or ``"tensorrt"`` (.engine).
        max_batch: largest batch size that the file must support. None: any; 1 for a TensorRT engine.
        max_length: largest number of positions, past and new together. None: as many as the model supports; at most
            2048 for a TensorRT engine; any for ONNX.
        overwrite: replace an existing file.
        progress: called with one line per step.

    Returns:
        The file and its validation: export error and method loss of each case.

    Raises:
        EffpassError: a pass can't act, the export fails, or the file is out of tolerance.
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
    """Check that :func:`export` can write `out`, as far as that is known before the model is loaded.

    Args:
        model: source of the model, as in :func:`load_model`. Its config determines how much memory the export needs.
        out: as in :func:`export`.
        recipe: as in :func:`export`.
        target: as in :func:`export`.
        overwrite: as in :func:`export`.
        device: device that the model would be loaded to.
        dtype: as in :func:`load_model`.
        trust_remote_code: as in :func:`load_model`.

    Raises:
        EffpassError: the export would fail.
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
        return  # loading the model reports what is wrong with the device
    require_current(place)
    on_device = None if kind == "cpu" else {"": device}
    weights = weights_size(model, dtype=dtype, device_map=on_device, trust_remote_code=trust_remote_code)
    if weights is not None:
        check_room(Path(out), weights[0])
        check_memory(found, *weights, place, loaded=False)


def load_exported(path: str | Path, *, allow_native: bool = False) -> Step:
    """Load an exported file as a function ``(input_ids, attention_mask, position_ids, *past) -> outputs``.

    The names and shapes of the tensors are those of :mod:`effpass.lowering.targets.decode_graph`. The tensors must be
    on the CPU, or on PyTorch's current GPU for a file that was exported on a GPU. Calls with sizes outside the range of
    the file, or with tensors on another device, are refused. The function of a GPU file may be used by one thread at a
    time; its calls can be captured in a CUDA graph.

    Args:
        path: file written by :func:`export`. An ``inductor`` file is compiled now, which takes seconds to minutes.
        allow_native: allow machine code from the file to run, which ``aoti`` needs. Only for files that you trust.

    Raises:
        ExportError: the file is not an exported file, was altered, was made for another machine or an absent GPU, or
            contains machine code and `allow_native` is False.
    """
    from effpass.lowering.targets.validate import open_exported

    return open_exported(Path(path), allow_native=allow_native)[0]


def validate(
    path: str | Path, *, allow_native: bool = False, progress: Callable[[str], None] | None = None
) -> Validation:
    """Check an exported file without its model: that it is unaltered, and that its outputs are right on this machine.

    Args:
        path: file written by :func:`export`.
        allow_native: as in :func:`load_exported`.
        progress: called with one line per step.

    Returns:
        The differences of each case. Its `ok` is True when all are within the tolerance of the file.

    Raises:
        ExportError: the file is not an exported file, is truncated or was altered, or contains machine code and
            `allow_native` is False.
    """
    from effpass.lowering.targets.validate import validate_file

    return validate_file(Path(path), allow_native=allow_native, progress=progress)


def swap_adapter(model: torch.nn.Module, adapter: str | Path) -> int:
    """Replace the adapter that `merge_lora` merges into the compiled `model`, without recompiling.

    Args:
        model: model compiled with the effpass backend and a recipe that contains ``merge_lora``.
        adapter: folder of a PEFT adapter for the same modules; its rank may differ.

    Returns:
        The number of weights that will be recomputed at the next call.

    Raises:
        ArtifactError: the adapter does not fit, in which case the current one stays.
        ModelError: no compiled graph of `model` merges an adapter from a folder.
    """
    from effpass.passes.weights.merge_lora import swap

    return swap(model, Path(adapter))
