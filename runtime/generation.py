"""The generation loop of the decode engine, called by transformers' `generate` through `custom_generate`.

transformers prepares generation config, logits processors and stopping criteria, and the loop runs these objects on
device tensors. The host queues decode steps without waiting for the device. It learns a few steps late whether all
sequences have ended, and tokens that were decoded beyond the end are removed.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from effpass.core.cache_name import CACHE_NAMES, cache_name
from effpass.core.errors import EffpassError
from effpass.runtime.cache import DecodeCache
from effpass.runtime.choice import Choice
from effpass.runtime.engine import Engine
from effpass.runtime.session import Session

__all__ = ["check_config", "check_positions", "generate", "new_tokens", "tokens_of"]

_LOOK_EVERY = 4  # steps between two copies of the state to the host
_IN_FLIGHT = 2  # copies that may be pending; more would let more steps run beyond the end
# Inputs of vision-language models besides token ids; transformers computes the last one from the first two.
_IMAGES = ("pixel_values", "image_sizes", "mm_encoder_outputs")
_TAKEN = ("attention_mask", "position_ids", *CACHE_NAMES, "use_cache", "logits_to_keep", "token_type_ids")


def generate(
    engine: Engine,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    streamer: Any = None,
    keep_tokens: Tensor | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Decode greedily or sample; transformers calls this function with everything that it has prepared.

    Args:
        engine: engine of the model.
        input_ids: int64 `[B, T]`, token ids of the prompts, padded on the left.
        logits_processor: processors to apply to the logits of each step.
        stopping_criteria: stopping criteria, one of which bounds the length.
        generation_config: config that transformers prepared.
        streamer: object that receives each step's tokens, int64 `[B]` on the CPU, at most a few steps late; None for
            no streaming.
        keep_tokens: bool `[B, T]`, prompt tokens that a cache with a budget may not evict; None for no such tokens.
        model_kwargs: `attention_mask` `[B, T]`, `past_key_values` of an earlier call, and the inputs of a
            vision-language model besides token ids.

    Returns:
        The sequences, int64 `[B, T + new]`, or with `return_dict_in_generate` an output whose `past_key_values` a later
        call can continue with. They are missing if steps ran beyond the end and a layer's state can't be reverted.

    Raises:
        EffpassError: for beam search, an empty prompt, padding on the right, a prompt longer than the model's
            positions, or an argument that the engine does not support.
    """
    images = {name: given for name in _IMAGES if (given := model_kwargs.pop(name, None)) is not None and len(given)}
    check_config(generation_config, model_kwargs)
    ids = input_ids.to(engine.device)
    cache = next((x for name in CACHE_NAMES if isinstance(x := model_kwargs.get(name), DecodeCache)), None)
    is_token = tokens_of(ids, model_kwargs.get("attention_mask"))
    check_positions(model_kwargs.get("position_ids"), is_token, ids.shape[1])
    _check_types(engine.model, model_kwargs.get("token_type_ids"))
    rows, length = ids.shape
    new = new_tokens(engine.model, length, stopping_criteria)
    with (
        torch.inference_mode(False), torch.no_grad(), engine.session(rows, length + new, cache) as session,
        _breaking(session, cache),
    ):  # fmt: skip
        known = session.length
        if known >= length:
            raise EffpassError(
                f"the prompt has {length} tokens, of which the cache holds {known}",
                hint="pass the whole conversation, with at least one token that the cache has not seen",
            )
        if is_token is not None:
            _check_mask(session, is_token[:, :known])
        more = {name: x.to(engine.device) if isinstance(x, Tensor) else x for name, x in images.items()}
        if keep_tokens is not None:
            more["keep"] = _kept(keep_tokens, ids, session)[:, known:]
        session.prefill(
            ids[:, known:], None if is_token is None else is_token[:, known:], max(1, engine.prefill_tokens // rows),
            **more,
        )  # fmt: skip
        choice = Choice(session, ids, new, logits_processor, stopping_criteria, generation_config)
        watch = _Watch(choice, streamer)
        choice.first()
        watch.look()
        for _ in range(1, new):
            if watch.has_ended:
                break
            choice.next()
            watch.look()
        done = watch.finish()
        result = choice.output(length + done)
        if generation_config.return_dict_in_generate:
            kept = length + done - 1  # the last token was never fed to the model
            if session.length == kept or session.cache.is_croppable:
                session.crop(kept)
                result[cache_name()] = engine.give(session)
            return GenerateDecoderOnlyOutput(**result)
    return result["sequences"]


@contextmanager
def _breaking(session: Session, cache: DecodeCache | None) -> Iterator[None]:
    """Context manager that marks the session of a given `cache` if the call fails or is cancelled after it began."""
    before = session.length
    try:
        yield
    except BaseException:
        session.is_broken = cache is not None and session.length != before
        raise


def _check_mask(session: Session, is_token: Tensor) -> None:
    """Raise an :class:`EffpassError` if tokens that the cache holds are masked, which the engine can't hide any more.

    Args:
        session: session of the cache.
        is_token: bool `[rows, K]`, mask of the tokens that the cache holds.
    """
    held, seen = session.positions() + 1, is_token.sum(1)
    if bool((held != seen).any()):
        row = int((held != seen).nonzero()[0])
        raise EffpassError(
            f"attention_mask has {int(seen[row])} tokens of sequence {row} that the cache holds, and it holds"
            f" {int(held[row])}",
            hint="a sequence that ended early was padded in the cache; pass the whole conversation without the cache",
        )


def _check_types(model: Any, token_type_ids: Tensor | None) -> None:
    """Raise an :class:`EffpassError` if the model would embed `token_type_ids`; vision models mask images by them."""
    if token_type_ids is None or "token_type_ids" not in inspect.signature(model.forward).parameters:
        return
    if model.config.get_text_config() is model.config:
        raise EffpassError(
            "token_type_ids: the decode engine has none",
            hint="leave them out, or call transformers' own: type(model).generate(model, ...)",
        )


# -- copying the state to the host ---------------------------------------------------------------------------------


class _Watch:
    """Observes without synchronization whether all sequences have ended, and passes tokens to the streamer."""

    def __init__(self, choice: Choice, streamer: Any) -> None:
        self.choice = choice
        self.streamer = streamer
        self.has_ended = False
        self._steps = 0
        self._is_cuda = choice.tokens.is_cuda
        self._waiting: deque[tuple[Tensor, Tensor, torch.cuda.Event]] = deque()
        self._free: list[tuple[Tensor, Tensor, torch.cuda.Event]] = []

    def look(self) -> None:
        """Start to copy the state of the step that was just queued, and read the copies that have completed."""
        choice = self.choice
        self._steps += 1
        if not self._is_cuda:
            self._take(choice.tokens, choice.goes_on)
            return
        if self.streamer is None and self._steps % _LOOK_EVERY:
            return
        tokens, goes_on, arrived = self._free.pop() if self._free else self._pinned()
        if self.streamer is not None:
            tokens.copy_(choice.tokens, non_blocking=True)
        goes_on.copy_(choice.goes_on, non_blocking=True)
        arrived.record()
        self._waiting.append((tokens, goes_on, arrived))
        while self._waiting and (len(self._waiting) > _IN_FLIGHT or self._waiting[0][2].query()):
            self._arrive()

    def finish(self) -> int:
        """Wait for the device, and return the number of steps until all sequences had ended."""
        while self._waiting:
            self._arrive()
        if self.streamer is not None:
            self.streamer.end()
        return min(self._steps, int(self.choice.lasted) + 1)

    def _pinned(self) -> tuple[Tensor, Tensor, torch.cuda.Event]:
        like = (self.choice.tokens, self.choice.goes_on)
        tokens, goes_on = (torch.empty_like(t, device="cpu", pin_memory=True) for t in like)
        return tokens, goes_on, torch.cuda.Event()

    def _arrive(self) -> None:
        tokens, goes_on, arrived = self._waiting.popleft()
        arrived.synchronize()
        self._take(tokens, goes_on)
        self._free.append((tokens, goes_on, arrived))

    def _take(self, tokens: Tensor, goes_on: Tensor) -> None:
        if self.streamer is not None and not self.has_ended:
            self.streamer.put(tokens.clone())
        self.has_ended = self.has_ended or not bool(goes_on)


# -- checks before anything runs -----------------------------------------------------------------------------------


def check_config(config: Any, model_kwargs: dict[str, Any]) -> None:
    """Raise an :class:`EffpassError` for settings and arguments that the decode engine does not support."""
    refused = {
        "num_beams": (config.num_beams or 1) > 1,
        "output_attentions": config.output_attentions,
        "output_hidden_states": config.output_hidden_states,
        "cache_implementation": config.cache_implementation not in (None, "dynamic"),
        "use_cache=False": config.use_cache is False,
    }
    for name, given in refused.items():
        if given:
            what = "beam search" if name == "num_beams" else name
            raise EffpassError(
                f"the decode engine samples or takes the best token, with a cache of its own: it has no {what}",
                hint="call transformers' own: type(model).generate(model, ...)",
            )
    unknown = sorted(name for name, value in model_kwargs.items() if name not in _TAKEN and value is not None)
    if unknown:
        raise EffpassError(
            f"the decode engine takes token ids alone, and was given {', '.join(unknown)}",
            hint="call transformers' own: type(model).generate(model, ...)",
        )


def tokens_of(ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Return the mask of the tokens in `ids`, bool `[B, T]`, False for padding; None if there is no padding."""
    if attention_mask is None:
        return None
    if attention_mask.shape != ids.shape:
        raise EffpassError(f"attention_mask is {tuple(attention_mask.shape)}, and input_ids {tuple(ids.shape)}")
    is_token = attention_mask.to(ids.device).bool()
    empty = (~is_token.any(1)).nonzero().flatten().tolist()
    if empty:
        raise EffpassError(f"row {empty[0]} of the batch holds no token", hint="leave empty prompts out of the batch")
    right = (~is_token[:, -1]).nonzero().flatten().tolist()
    if right:
        raise EffpassError(
            f"row {right[0]} of the batch is padded on the right", hint="tokenizer.padding_side = 'left'"
        )
    return None if bool(is_token.all()) else is_token


def _kept(keep_tokens: Tensor, ids: Tensor, session: Session) -> Tensor:
    """Check `keep_tokens` and return it on the device of `ids`."""
    if not session.gives_up:
        raise EffpassError(
            "keep_tokens: this model's cache gives up no tokens",
            hint="put prefix_kv into the recipe, or leave keep_tokens out",
        )
    if keep_tokens.dtype != torch.bool or keep_tokens.shape != ids.shape:
        raise EffpassError(
            f"keep_tokens is {keep_tokens.dtype} {tuple(keep_tokens.shape)}, and input_ids {tuple(ids.shape)}",
            hint="give a bool for every token of the prompt",
        )
    return keep_tokens.to(ids.device)


def check_positions(position_ids: Tensor | None, is_token: Tensor | None, length: int) -> None:
    """Raise an :class:`EffpassError` unless positions count the tokens of each sequence, as the engine does.

    Args:
        position_ids: int `[B, T]`, for the last T of `length` tokens; None for positions that were not given.
        is_token: bool `[B, length]`; None for no padding.
        length: number of tokens of each sequence.
    """
    if position_ids is None:
        return
    given = position_ids.to(torch.long)
    count = torch.arange(given.shape[1], device=given.device)
    if is_token is None:
        plain = torch.equal(given, (count + length - given.shape[1]).expand_as(given))
    else:
        counted = is_token.to(given.device).cumsum(1)[:, -given.shape[1] :] - 1
        plain = torch.equal(given[is_token[:, -given.shape[1] :]], counted[is_token[:, -given.shape[1] :]])
    if not plain:
        raise EffpassError(
            "position_ids are not those of the tokens in order; the decode engine counts them itself",
            hint="leave position_ids out, or call transformers' own: type(model).generate(model, ...)",
        )


def new_tokens(model: Any, length: int, criteria: StoppingCriteriaList) -> int:
    """Return the maximum number of new tokens after a prompt of `length` tokens."""
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and length >= longest:
        raise EffpassError(f"the prompt has {length} tokens, and the model {longest} positions", hint="shorten it")
    end = criteria.max_length
    if end is None:
        raise EffpassError("no stopping criterion bounds the length", hint="give max_new_tokens")
    if longest is not None and end > longest:
        raise EffpassError(
            f"prompt and answer come to {end} tokens, and the model has {longest} positions",
            hint=f"max_new_tokens={longest - length} is the most after this prompt of {length}",
        )
    return end - length
