"""The decode engine: caches and CUDA graphs for one model, kept from call to call.

Sessions come in batch buckets (powers of two on a GPU), each with the largest capacity asked for so far. A session
whose cache was handed to the user (`return_dict_in_generate=True`) is the user's, and the engine makes another.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from effpass.core.errors import EffpassError, HostMemoryError, ModelError
from effpass.runtime.attention import reading_cache
from effpass.runtime.cache import DecodeCache, layer_windows
from effpass.runtime.session import Backend, Session

__all__ = ["Engine", "check_decodable"]

NewSession = Callable[[Any, int, int, Backend | None], Session]

_CAPACITY_STEP = 256


class Engine:
    """Decodes with `model`.

    Args:
        model: a transformers causal LM in `eval()` mode, on one device.
        backend: compiles decode steps on a GPU (a `torch.compile` backend); None runs the model's own operators.
        prefill_tokens: tokens of a prompt, over the whole batch, to run at once; bounds the memory of activations.
        new_session: makes a session from the model, rows, capacity and backend: what a pass replaces that has a cache
            of its own.

    Raises:
        ModelError: the model has no place in the engine: on several devices, an encoder-decoder, recurrent layers.
    """

    def __init__(
        self,
        model: Any,
        *,
        backend: Backend | None = None,
        prefill_tokens: int = 32768,
        new_session: NewSession = Session,
    ) -> None:
        check_decodable(model)
        self.model = model
        self.backend = backend
        self.prefill_tokens = prefill_tokens
        self.new_session = new_session
        self._free: dict[int, Session] = {}
        self.speculators: dict[Any, Any] = {}  # made by runtime.speculative, one for a draft and its trees
        self.last_speculation: Any = None  # what the last generation with a draft was

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_free": {}, "speculators": {}}  # a copy of the model starts with none

    @property
    def device(self) -> torch.device:
        return self.model.device

    @contextmanager
    def session(self, rows: int, capacity: int, cache: DecodeCache | None = None) -> Iterator[Session]:
        """A session for `rows` sequences of up to `capacity` tokens; `model` attends through its cache inside.

        Args:
            rows: sequences.
            capacity: tokens of prompt and answer.
            cache: one that :meth:`give` handed out, to go on with; its tokens are kept.

        Raises:
            EffpassError: the device has no room, or `cache` does not fit.
        """
        session: Session | None = None
        try:
            session = self._take(rows, capacity) if cache is None else self._again(cache, rows, capacity)
            with reading_cache(self.model):
                yield session
        except torch.OutOfMemoryError as error:
            session = None
            self._release()
            raise self.no_room(rows, capacity) from error
        except HostMemoryError:
            session = None
            self._release()
            raise
        finally:
            if session is not None and not session.is_given:
                self._free[session.batch] = session

    def give(self, session: Session) -> DecodeCache:
        """Hand the session's cache to the user; the engine does not write into it unless the user passes it back."""
        session.is_given, session.cache.session = True, session
        return session.cache

    def release(self) -> None:
        """Free the buffers and graphs that are kept for the next call."""
        if self._free or self.speculators:
            self._release()

    def _release(self) -> None:
        self._free.clear()
        self.speculators.clear()
        gc.collect()  # what Dynamo made of a step is a knot of references
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _take(self, rows: int, capacity: int) -> Session:
        batch = 1 << (rows - 1).bit_length() if self.device.type == "cuda" else rows
        session = self._free.pop(batch, None)
        if session is None or session.capacity < capacity:
            del session  # before a larger one is made
            capacity += -capacity % _CAPACITY_STEP
            session = self.new_session(self.model, batch, capacity, self.backend)
        session.begin(rows)
        return session

    def _again(self, cache: DecodeCache, rows: int, capacity: int) -> Session:
        session = cache.session
        if not isinstance(session, Session) or session.model is not self.model:
            raise EffpassError("past_key_values is not a cache that this model's generate returned")
        if session.rows != rows:
            raise EffpassError(f"past_key_values holds {session.rows} sequences, and the prompt {rows}")
        if session.capacity < capacity:
            raise EffpassError(
                f"past_key_values has room for {session.capacity} tokens, and prompt and answer are {capacity}",
                hint="give max_length in the first call that is as large as the whole conversation",
            )
        return session

    def no_room(self, rows: int, capacity: int) -> EffpassError:
        """What is said where the device's memory does not do."""
        return EffpassError(
            f"no room on {self.device} for {rows} sequences of {capacity} tokens beside the model",
            hint="lower the batch, max_new_tokens, or the engine's prefill_tokens (what a long prompt runs at once)",
        )


def check_decodable(model: Any) -> None:
    """Raise a :class:`ModelError` when :class:`Engine` can't run `model`."""
    name = type(model).__name__
    if not hasattr(model, "generate") or model.config.is_encoder_decoder:
        raise ModelError(f"{name} is no decoder that generates")
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1:
        raise ModelError(
            f"{name} has weights on {', '.join(devices)}; the decode engine runs on one device",
            hint="load it without device_map, or leave generation to transformers",
        )
    if not model._can_set_attn_implementation():
        raise ModelError(
            f"{name} does not attend through transformers' AttentionInterface",
            hint="transformers' own generate runs it",
        )
    for path, module in model.named_modules():
        if isinstance(getattr(module, "sinks", None), torch.nn.Parameter):
            raise ModelError(
                f"{path} attends to sinks, which the decode engine lacks", hint="transformers' own generate runs it"
            )
        if getattr(module, "waits_for_ranks", False):
            raise ModelError(
                f"{path} waits for other ranks in every forward, and each ends with its own sequences",
                hint="transformers' own generate runs it, with synced_gpus=True",
            )
    layer_windows(model.config)
