"""Replacement of a transformers model's `generate` by one that runs on the decode engine.

``effpass.prepare`` calls :func:`attach` on the models that it prepares. transformers still prepares each call (config,
logits processors, stopping criteria) and calls the engine's loop through its `custom_generate` argument.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor
from transformers import StoppingCriteriaList, StopStringCriteria

from effpass.core.errors import EffpassError
from effpass.runtime import generation
from effpass.runtime.engine import Engine
from effpass.runtime.session import Backend

__all__ = ["attach", "engine_of", "generate"]

_THEIRS = ("custom_generate", "assistant_model", "prompt_lookup_num_tokens", "speculation_type")


def engine_of(model: Any, *, backend: Backend | None = None) -> Engine:
    """Return the engine of `model`, which is created on first use and stored on the model.

    Args:
        model: a transformers causal LM.
        backend: backend as in :class:`Engine`, used only if the engine is created by this call.

    Raises:
        ModelError: if the engine can't run this model.
    """
    engine = getattr(model, "effpass_engine", None)
    if not isinstance(engine, Engine) or engine.model is not model:
        model.effpass_engine = Engine(model, backend=backend)
    return model.effpass_engine


def attach(model: Any, *, backend: Backend | None = None) -> Engine:
    """Replace `generate` of this model instance by one that runs on the decode engine.

    The new method takes the arguments of transformers' `generate`, and transformers prepares them. Assisted generation
    and custom generation loops are left to transformers.

    Args:
        model: a transformers causal LM.
        backend: backend that compiles decode steps, as in :class:`Engine`.

    Returns:
        The engine of the model.

    Raises:
        ModelError: if the engine can't run this model.
    """
    engine = engine_of(model, backend=backend)  # a pass may have created it already, with its own kind of session
    engine.backend = backend
    engine.release()
    model.generate = MethodType(generate, model)
    return engine


def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Generate with the decode engine; the `generate` of a prepared model.

    Arguments and results are those of transformers' `generate`. Additional arguments are `keep_tokens`, a bool `[B, T]`
    mask of the prompt tokens that a cache with a budget may not evict, and `draft` and `tree` for speculative decoding
    (:mod:`effpass.runtime.speculative.open_draft`).
    """
    original = type(self).generate
    if any(kwargs.get(name) is not None for name in _THEIRS):
        return original(self, *args, **kwargs)
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    if isinstance(ids, Tensor) and ids.numel() == 0:  # transformers would raise an index error
        raise EffpassError(f"the prompt is empty: input_ids is {tuple(ids.shape)}", hint="give at least one token")
    streamer, keep = kwargs.pop("streamer", None), kwargs.pop("keep_tokens", None)
    run = _speculative(self, kwargs, keep)
    kwargs["stopping_criteria"] = _with_stop_strings(self, kwargs)

    def loop(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
        if streamer is not None:
            streamer.put(input_ids.cpu())
        if run is not None:
            return run(input_ids, streamer=streamer, **prepared)
        return generation.generate(model.effpass_engine, input_ids, streamer=streamer, keep_tokens=keep, **prepared)

    return original(self, *args, custom_generate=loop, **kwargs)


def _speculative(model: Any, kwargs: dict[str, Any], keep: Any) -> Callable[..., Any] | None:
    """Return the speculative generation loop if `draft` was given; removes `draft` and `tree` from `kwargs`."""
    draft, tree = kwargs.pop("draft", None), kwargs.pop("tree", None)
    if draft is None:
        if tree is not None:
            raise EffpassError(f"tree={tree!r} without a draft", hint="give draft=... as well")
        return None
    if keep is not None:
        raise EffpassError("keep_tokens: speculative decoding gives up no tokens", hint="leave one of both out")
    from effpass.runtime import speculative

    return partial(speculative.generate, speculative.speculator_of(model.effpass_engine, draft, tree))


def _with_stop_strings(model: Any, kwargs: dict[str, Any]) -> StoppingCriteriaList:
    """Return the stopping criteria with `stop_strings` converted into one of them.

    transformers would do this itself, but does not pass on the tokenizer that it needs to a custom loop.
    """
    criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
    strings = kwargs.pop("stop_strings", None)
    config = kwargs.get("generation_config")
    for place in (config, model.generation_config):
        if strings is None and place is not None:
            strings = place.stop_strings
    if strings is None:
        return criteria
    tokenizer = kwargs.get("tokenizer")
    if tokenizer is None:
        raise EffpassError(f"stop_strings={strings!r} needs the tokenizer", hint="generate(..., tokenizer=tokenizer)")
    kwargs["stop_strings"] = None
    if config is not None and config.stop_strings is not None:
        kwargs["generation_config"] = type(config)(**{**config.to_dict(), "stop_strings": None})
    return StoppingCriteriaList([*criteria, StopStringCriteria(stop_strings=strings, tokenizer=tokenizer)])
