"""A cache with the fixed tensors and the CUDA graph that decode into it.

One decode step is: enter the positions of the new tokens, run the model on them, move every sequence on. On a GPU the
step is recorded once as a CUDA graph and replayed; on a CPU the same code runs. Nothing in a step waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effpass.core.derived_arguments import DerivedArguments
from effpass.runtime.cache import DecodeCache
from effpass.runtime.cuda_graph import record

__all__ = ["ENDS", "Answer", "Session", "Tail"]

Backend = Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[..., Any]]

ENDS = 16  # tokens that end a sequence, at most, where a step is to notice them by itself


class Tail(NamedTuple):
    """What is done with a step's logits, recorded with the step; tails of equal keys do the same."""

    key: tuple[Any, ...]
    run: Callable[[Tensor], None]


class Answer:
    """What a generation has come to, in buffers that a CUDA graph can hold.

    Attributes:
        ids: int64 `[B, capacity]`: prompt and answer.
        column: int64 `[1]`: where the next token goes.
        unfinished: int64 `[B]`: 1 for sequences that go on.
        goes_on: bool `[]`: whether any does.
        lasted: int64 `[]`: the number of steps after which any did.
        ends: int64 `[ENDS]`: tokens that end a sequence, then -1.
        pad: int64 `[]`: what follows the end.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        of: dict[str, Any] = {"dtype": torch.long, "device": device}
        self.ids = torch.zeros(batch, capacity, **of)
        self.column = torch.zeros(1, **of)
        self.unfinished = torch.zeros(batch, **of)
        self.goes_on = torch.ones((), dtype=torch.bool, device=device)
        self.lasted = torch.zeros((), **of)
        self.ends = torch.full((ENDS,), -1, **of)
        self.pad = torch.zeros((), **of)

    def begin(self, prompt: Tensor, pad: Tensor | None, ends: Sequence[Tensor], lasted: int) -> None:
        """Start behind `prompt`, int64 `[rows, T]`; of `ends`, the first :data:`ENDS` tokens are kept."""
        rows, length = prompt.shape
        self.ids[:rows, :length] = prompt
        self.column.fill_(length)
        self.unfinished.zero_()
        self.unfinished[:rows] = 1
        self.goes_on.fill_(True)
        self.lasted.fill_(lasted)
        self.ends.fill_(-1)
        if ends:
            tokens = torch.cat(list(ends))[:ENDS]
            self.ends[: len(tokens)].copy_(tokens)
        if pad is None:
            self.pad.zero_()
        else:
            self.pad.copy_(pad)


class Session:
    """Decodes `rows` sequences with a model whose attention reads a :class:`DecodeCache`.

    Args:
        model: a transformers causal LM. Calls are made while `reading_cache` is entered.
        batch: rows of the buffers B; a batch of fewer sequences leaves the rest empty.
        capacity: slots of the buffers: tokens of prompt and answer together.
        backend: compiles the decode step for the CUDA graph; None runs the model as it is.

    Attributes:
        tokens: int64 `[B, 1]`: the next step's input.
        logits: `[B, vocab]`: output of the prompt, or of the last step that had no tail; there after the first prompt.
        answer: what was generated.
        rows: sequences in use.
        length: tokens of each sequence that are in the cache, padding included (*logical length*).
        is_given: the user holds the cache.
        gives_up: the cache drops tokens, and `prefill` takes `keep`, a mask of those that it may not.
    """

    logits: Tensor
    gives_up = False

    def __init__(self, model: Any, batch: int, capacity: int, backend: Backend | None) -> None:
        device = model.device
        self.model = model
        self.backend = backend
        self.cache = self._new_cache(batch, capacity)
        new_reader = getattr(model, "effpass_reader", None)
        self.cache.reader = None if new_reader is None else new_reader()
        self.answer = Answer(batch, capacity, device)
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.rows = batch
        self.length = 0
        self.is_given = False
        self._keeps_one = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        # An empty row's position stays -1: its tokens are padding, they read nothing and nobody reads them.
        self._position = torch.full((batch, 1), -1, dtype=torch.int32, device=device)
        self._index = torch.zeros_like(self._position)  # the same for the model, which may look it up in a table
        self._moves = torch.zeros(batch, 1, dtype=torch.int32, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._key: tuple[Any, ...] | None = None  # of the cache's plan and the tail in the graph
        self._model: Callable[..., Any] | None = None  # as the graph runs it
        self._compiled: list[Callable[..., Any]] = []
        self._weights: tuple[int, ...] = ()

    def _new_cache(self, batch: int, capacity: int) -> DecodeCache:
        if (offload := getattr(self.model, "effpass_offload", None)) is not None:
            return offload.cache(self.model, batch, capacity)
        return DecodeCache(self.model.config, batch, capacity, self.model.device)

    @property
    def batch(self) -> int:
        return self.cache.batch

    @property
    def capacity(self) -> int:
        return self.cache.capacity

    def begin(self, rows: int) -> None:
        """Start anew with `rows` empty sequences."""
        self.cache.reset()
        self.rows = rows
        self.length = 0
        self._position.fill_(-1)
        self._index.zero_()
        self._moves.zero_()
        self._moves[:rows] = 1

    def prefill(self, input_ids: Tensor, is_token: Tensor | None, chunk: int, **inputs: Any) -> None:
        """Run the next tokens of every sequence; their last logits are in :attr:`logits`.

        Args:
            input_ids: int64 `[rows, T]`.
            is_token: bool `[rows, T]`, False for padding; None when nothing is.
            chunk: tokens of each sequence to run at once; with `inputs` all are.
            inputs: what the model takes beside them, such as `pixel_values`.
        """
        positions, tokens = self._begin_prompt(input_ids, is_token), input_ids.shape[1]
        chunk = tokens if inputs else chunk
        for first in range(0, tokens, chunk):
            ids, part = input_ids[:, first : first + chunk], positions[:, first : first + chunk].contiguous()
            for slots in self.cache.distinct_slots():
                slots.is_dense &= is_token is None
            self._enter(part)
            self._keep_logits(self._call(self.model, ids, part.clamp(min=0), **inputs), 0)
        self._end_prompt(positions)

    def _begin_prompt(self, input_ids: Tensor, is_token: Tensor | None) -> Tensor:
        """Positions int32 `[rows, T]` of the next tokens, -1 for padding."""
        if self._weights != self._weight_addresses():
            self._graph = self._model = None
        if any(isinstance(c, DerivedArguments) for c in self._compiled):
            self._graph = None  # derived weights are looked at by what calls the compiled code, and a graph does not
        rows, tokens = input_ids.shape
        before = self._position[:rows]
        if is_token is None:
            positions = before + torch.arange(1, tokens + 1, dtype=torch.int32, device=before.device)
        else:
            positions = torch.where(is_token, before + is_token.cumsum(1, dtype=torch.int32), -1)
        return positions

    def _keep_logits(self, logits: Tensor, row: int) -> None:
        if not hasattr(self, "logits"):
            self.logits = logits.new_zeros(self.batch, logits.shape[1])
        self.logits[row : row + len(logits)].copy_(logits)

    def _end_prompt(self, positions: Tensor) -> None:
        before = self._position[: len(positions)]
        before.copy_(positions.amax(1, keepdim=True).maximum(before))
        torch.clamp(self._position, min=0, out=self._index)
        self.cache.changed()

    def step(self, tail: Tail | None = None) -> None:
        """Run :attr:`tokens`; `tail` gets their logits, or they are in :attr:`logits`."""
        plan = self.cache.ready()
        if self.model.device.type != "cuda":
            self._move()
            self._enter(self._position)
            self._forward(self.model, tail)
            self.cache.stepped()
            return
        if self._graph is None or self._key != (plan, tail and tail.key):
            self._record(tail)
            self._key = (plan, tail and tail.key)
        assert self._graph is not None
        self.cache.advance(1)
        self.length += 1
        self._graph.replay()

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens of every sequence.

        The tokens that go must all be real ones, and have stood in the cache's last slots.
        """
        removed = self.length - length
        if removed > 0:
            self.cache.crop(-removed)
            self.length = length
            self._position[: self.rows] -= removed
            torch.clamp(self._position, min=0, out=self._index)

    # -- one call -------------------------------------------------------------------------------------------------

    def _enter(self, positions: Tensor) -> None:
        self.cache.append(positions)
        self.cache.advance(positions.shape[1])
        self.length += positions.shape[1]

    def _move(self) -> None:
        torch._foreach_add_([self._position, self._index], [self._moves, self._moves])

    def _call(self, model: Callable[..., Any], input_ids: Tensor, index: Tensor, **inputs: Any) -> Tensor:
        """Logits `[rows, vocab]` of the last tokens."""
        output = model(
            input_ids=input_ids,
            position_ids=index,
            past_key_values=self.cache,
            effpass_cache=self.cache,
            use_cache=True,
            return_dict=True,
            **self._keeps_one,
            **inputs,
        )
        return output.logits[:, -1]

    def _forward(self, model: Callable[..., Any], tail: Tail | None) -> None:
        logits = self._call(model, self.tokens, self._index)
        if tail is None:
            self.logits.copy_(logits)
        else:
            tail.run(logits)

    # -- the CUDA graph -------------------------------------------------------------------------------------------

    def _record(self, tail: Tail | None) -> None:
        """Record a step as a CUDA graph, with the device's state left as it was."""
        if self._model is None:
            self._compiled.clear()
            self._model = self._compile() if self.backend is not None else self.model
        model = self._model
        device_state = [self._position, self._index, *self.cache.state()]
        saved = [t.clone() for t in device_state]

        def step(tail: Tail | None) -> None:
            self._move()
            self.cache.append(self._position)
            self._forward(model, tail)
            self.cache.stepped()

        def try_out() -> None:
            for _ in range(2):
                step(None)  # a tail has run after the prompt, and may draw random numbers
                for tensor, value in zip(device_state, saved, strict=True):
                    tensor.copy_(value)

        with self._recording():
            self._graph = None  # its memory goes first
            self._graph = record(lambda: step(tail), warm_up=try_out)
        self._weights = self._weight_addresses()

    @contextmanager
    def _recording(self) -> Iterator[None]:
        experts = getattr(self.model.config, "_experts_implementation", None)
        waits = experts in ("eager", "grouped_mm") and self.model._can_set_experts_implementation()
        if waits:  # for the device, to learn how many tokens each expert has
            self.model.set_experts_implementation("batched_mm")
        for slots in self.cache.distinct_slots():
            slots.is_replayed = True
        try:
            yield
        finally:
            for slots in self.cache.distinct_slots():
                slots.is_replayed = False
            if waits:
                self.model.set_experts_implementation(experts)

    def _compile(self, forward: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """The model, or what calls it, compiled for this session alone."""

        # Nothing here refers to the session: its buffers go when it goes, not when garbage is collected.
        compile_graph, kept, forward = self.backend, self._compiled, forward or self.model.forward
        assert compile_graph is not None

        def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            kept.append(compile_graph(gm, inputs))
            return kept[-1]

        def call(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        # Dynamo keeps what it compiled by code object: one of its own, or all sessions share guards and their number.
        own = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
        return torch.compile(own, backend=backend, dynamic=False, fullgraph=True)

    def _weight_addresses(self) -> tuple[int, ...]:
        """A graph reads weights where they lay when it was recorded."""
        return tuple(p.data_ptr() for p in self.model.parameters())
