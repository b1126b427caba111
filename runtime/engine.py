"""The decode engine: caches and CUDA graphs of one model, which are reused from call to call.

An :class:`Engine` keeps one :class:`~effpass.runtime.session.Session` (a cache with the CUDA graph that decodes into
it) per batch bucket, a power of two on a GPU, with the largest capacity requested so far. If a generation returns its
cache to the user (`return_dict_in_generate=True`), the session belongs to the user, and the engine creates another one
for the next call.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from effpass.core.alone import alone
from effpass.core.errors import EffpassError, HostMemoryError, ModelError
from effpass.runtime.attention import reading_cache
from effpass.runtime.cache import DecodeCache, layer_windows
from effpass.runtime.passed_arguments import drops_arguments
from effpass.runtime.session import Backend, Session

__all__ = ["Engine", "check_decodable"]

NewSession = Callable[[Any, int, int, Backend | None], Session]

_CAPACITY_STEP = 256


class Engine:
    """Creates and keeps the sessions that a model decodes with.

    Args:
        model: a transformers causal LM in `eval()` mode, on one device.
        backend: `torch.compile` backend that compiles decode steps on a GPU; None runs the model's own operators.
        prefill_tokens: maximum number of prompt tokens, over the whole batch, in one prefill chunk; bounds the memory
            of activations.
        new_session: function that creates a session from model, batch size, capacity and backend; passes with a cache
            of their own replace it.

    Attributes:
        speculators: speculative decoders of :mod:`effpass.runtime.speculative`, one per draft and tree.
        last_speculation: statistics of the last generation with a draft; None before the first one.

    Raises:
        ModelError: if the engine can't run the model, for example because it is on several devices, is an
            encoder-decoder, or has recurrent layers.
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
        self.speculators: dict[Any, Any] = {}
        self.last_speculation: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_free": {}, "speculators": {}}  # a copy of the model starts without sessions

    @property
    def device(self) -> torch.device:
        return self.model.device

    @contextmanager
    def session(self, rows: int, capacity: int, cache: DecodeCache | None = None) -> Iterator[Session]:
        """Context manager that yields a session, and in which `model` attends through the session's cache.

        One thread at a time can be in it; others wait.

        Args:
            rows: number of sequences.
            capacity: number of tokens of prompt and answer together, per sequence.
            cache: cache that :meth:`give` returned, to continue with its tokens; None for an empty cache.

        Raises:
            EffpassError: if the device has not enough memory, or `cache` does not fit.
        """
        with alone(self.model):
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
                    if self.device.type == "cpu":  # on a GPU, batch sizes are few, and keeping one saves its CUDA graph
                        self._free.clear()
                    self._free[session.batch] = session

    def give(self, session: Session) -> DecodeCache:
        """Give the session's cache to the user; the engine then writes to it only if the user passes it back."""
        session.is_given, session.cache.session = True, session
        return session.cache

    def release(self) -> None:
        """Free the buffers and CUDA graphs that are kept for the next call."""
        if self._free or self.speculators:
            self._release()

    def _release(self) -> None:
        self._free.clear()
        self.speculators.clear()
        gc.collect()  # compiled steps contain reference cycles
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _take(self, rows: int, capacity: int) -> Session:
        batch = 1 << (rows - 1).bit_length() if self.device.type == "cuda" else rows
        session = self._free.pop(batch, None)
        if session is None or session.capacity < capacity:
            del session  # free it before a larger one is created
            if getattr(self.model, "effpass_offload", None) is not None:
                self._free.clear()  # the limit of host memory counts idle caches too
            capacity += -capacity % _CAPACITY_STEP
            session = self.new_session(self.model, batch, capacity, self.backend)
        session.begin(rows)
        return session

    def _again(self, cache: DecodeCache, rows: int, capacity: int) -> Session:
        session = cache.session
        if not isinstance(session, Session) or session.model is not self.model:
            raise EffpassError("the given cache is not one that this model's generate returned")
        if session.is_broken:
            raise EffpassError(
                "the call that this cache was given to failed or was cancelled, and left some of its tokens in it",
                hint="pass the conversation again without the cache",
            )
        if session.rows != rows:
            raise EffpassError(f"the given cache holds {session.rows} sequences, and the prompt {rows}")
        if session.capacity < capacity:
            raise EffpassError(
                f"the given cache has room for {session.capacity} tokens, and prompt and answer are {capacity}",
                hint="give max_length in the first call that is as large as the whole conversation",
            )
        return session

    def no_room(self, rows: int, capacity: int) -> EffpassError:
        """Return the error for insufficient memory on the device."""
        return EffpassError(
            f"no room on {self.device} for {rows} sequences of {capacity} tokens beside the model",
            hint="lower the batch, max_new_tokens, or the engine's prefill_tokens (what a long prompt runs at once)",
        )


def check_decodable(model: Any) -> None:
    """Raise a :class:`ModelError` if :class:`Engine` can't run `model`."""
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
    if (path := drops_arguments(model)) is not None:
        raise ModelError(
            f"{name}: the decode engine's cache does not reach {path}, whose decoder layer does not pass on arguments"
            " that it does not know",
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
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        raise ModelError(
            f"{name} rotates all keys anew beyond {rope.get('original_max_position_embeddings')} positions (longrope),"
            " and the decode engine keeps them as they are cached",
            hint="transformers' own generate runs it",
        )
    layer_windows(model.config)
