"""The Python interface of effpass: load, prepare, optimize, inspect, generate, export.

model = effpass.load_model("smollm2").model
model = effpass.prepare(model, "recipe.yaml")        # an ordinary transformers model with every pass of the recipe
model.generate(...)

The functions validate their arguments and call the pass manager (:mod:`effpass.core.manager`), the decode engine
(:mod:`effpass.runtime`) and the export targets (:mod:`effpass.lowering.targets`). The command line is built on them.
"""

from __future__ import annotations

import inspect as python_inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from effpass.checkpoints import check_savable, save
from effpass.core.errors import EffpassError, ModelError, PassRefusedError
from effpass.core.inspection import Inspection, inspect_model
from effpass.core.live_weights import refresh
from effpass.core.manager import PassManager, Planned
from effpass.core.model import LoadedModel, inner_model, load_model
from effpass.core.options import dump_options
from effpass.core.plan import plan, read_recipe
from effpass.core.prompt import prompt_inputs
from effpass.core.recipe import Recipe
from effpass.core.roofline import ceilings, device_and_dtype, known
from effpass.exports import check_export, export, load_exported, validate

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


def prepare(
    model: torch.nn.Module, recipe: Recipe | str | Path | Mapping[str, Any] | None = None, **compile_options: Any
) -> torch.nn.Module:
    """Apply every pass of `recipe` to `model`; the result is an ordinary transformers model that can generate.

    Passes that rewrite models change `model` in place: weights are folded or sliced once, which is the only way that
    also saves memory. If there are passes that only rewrite graphs, the forward calls of the model are compiled with
    the effpass backend; settings that such a pass needs are changed for good, and reported. `generate` of the result
    runs on the decode engine (:mod:`effpass.runtime.engine`).

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
    prepared, second = _prepare(model, plan(recipe))
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
    settings = [p.pass_.make_ready(model) for p in second]
    report.changed = [setting.line for setting in settings if setting is not None]
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
        EffpassError: a pass can't act on `model`, or `mode` or `inner` is unknown; nothing was changed then.
    """
    options = _inner_options(inner, mode)
    prepared, second = _prepare(model, plan(recipe))
    options["passes"] = second
    prepared.compile(backend="effpass", options=options, dynamic=dynamic, fullgraph=fullgraph)
    return prepared


def _inner_options(inner: str, mode: str | None) -> dict[str, Any]:
    """Options of the effpass backend for an inner backend, which must be registered, and a mode of Inductor."""
    from effpass.backend import BackendOptions, inner_backend

    options: dict[str, Any] = {"inner": inner}
    inner_backend(BackendOptions.parse(options), mode)
    if mode is not None:
        from torch._inductor import list_mode_options

        options["inner_options"] = list_mode_options(mode)  # torch.compile takes a mode or options, not both
    return options


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
    planned = plan(recipe)
    at = ceilings(*device_and_dtype(model)) if predict_for is None else known(predict_for)
    sizes = {"batch": batch, "tokens": tokens, "cache_length": cache_length}
    settings = [setting for p in planned if (setting := p.pass_.make_ready(model)) is not None]
    try:
        found = inspect_model(model, planned, at, input_ids=input_ids, **sizes)
    finally:
        for setting in settings:
            setting.undo()
    found.changed = [setting.line for setting in settings]
    return found


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
        Pieces of the text in order, while it is being generated. Closing the iterator ends the generation. If the model
        is generating for another iterator, the first piece comes after that has ended.
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
            streamer.on_finalized_text("", stream_end=True)  # `end` would decode the rest, which may be what failed

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
        token_streamer: a streamer that receives the new tokens alone. The argument `streamer` of transformers'
            `generate` works too, and receives the prompt first.
        draft: draft for speculative decoding: a model, the folder of one, ``"ngram"`` or ``"layers:0,1,5"``. None
            decodes without a draft.
        tree: token tree that the draft builds: ``"chain"``, ``"static"``, ``"eagle2"`` or ``"c2t"``; sizes may follow.
        model_kwargs: prepared arguments of the model: `attention_mask`, `past_key_values`.

    Returns:
        What transformers' `generate` returns for the same arguments.

    Raises:
        EffpassError: the engine can't run the model, or does not support an argument; or there are two streamers, or a
            tree without a draft.
    """
    streamer = _streamer_of(sys._getframe(1))
    if token_streamer is not None and streamer is not None:
        raise EffpassError("streamer and token_streamer are both given", hint="leave one of both out")
    if draft is None and tree is not None:
        raise EffpassError(f"tree={tree!r} without a draft", hint="give draft=... as well")
    from effpass.backend import DecodeBackend
    from effpass.runtime import generation, speculative
    from effpass.runtime.attach import engine_of

    engine = engine_of(model, backend=DecodeBackend())
    prepared = {
        "logits_processor": logits_processor,
        "stopping_criteria": stopping_criteria,
        "generation_config": generation_config,
        "streamer": streamer if token_streamer is None else token_streamer,
        **model_kwargs,
    }
    if draft is None:
        return generation.generate(engine, input_ids, **prepared)
    return speculative.generate(speculative.speculator_of(engine, draft, tree), input_ids, **prepared)


def _streamer_of(caller: FrameType) -> Any:
    """The argument `streamer` of the `generate` that called a loop: transformers does not pass it on.

    It has put the prompt into the streamer already, whose reader waits for what follows.
    """
    from transformers import GenerationMixin

    theirs = python_inspect.unwrap(GenerationMixin.generate).__code__
    return caller.f_locals.get("streamer") if caller.f_code is theirs else None


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
