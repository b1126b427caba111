"""A session: a KV cache with the fixed tensors and the CUDA graph that decode into it.

A decode step advances the position of every sequence, enters the positions in the cache, and runs the model on the new
tokens. On a GPU the step is recorded once as a CUDA graph and then replayed; on a CPU the same code runs directly. No
operation of a step synchronizes with the device. :class:`~effpass.runtime.engine.Engine` creates and reuses sessions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effpass.core.cache_name import cache_name
from effpass.core.derived_arguments import DerivedArguments
from effpass.runtime.cache import DecodeCache
from effpass.runtime.cuda_graph import record
from effpass.runtime.prompt_graphs import PromptGraphs, RecordedPrompt, can_be_recorded, padded_size

__all__ = ["ENDS", "Answer", "Session", "Tail"]

Backend = Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[..., Any]]

_PROMPT_GRAPHS = ("cuda",)  # kinds of devices whose short prompts are recorded
ENDS = 16  # maximum number of end-of-sequence tokens that a CUDA graph can check for


class Tail(NamedTuple):
    """Operations on the logits of a step, recorded with it in one CUDA graph.

    Attributes:
        key: identifies the operations; tails with equal keys share a graph.
        run: function that performs the operations on logits `[B, vocab]`.
    """

    key: tuple[Any, ...]
    run: Callable[[Tensor], None]


class Answer:
    """State of a generation, in buffers of fixed address that a CUDA graph can write.

    Attributes:
        ids: int64 `[B, capacity]`, token ids of prompt and answer.
        column: int64 `[1]`, column of `ids` for the next token.
        unfinished: int64 `[B]`, 1 for sequences that have not ended.
        goes_on: bool `[]`, whether any sequence is unfinished.
        lasted: int64 `[]`, number of steps after which some sequence was unfinished.
        ends: int64 `[ENDS]`, end-of-sequence tokens, filled up with -1.
        pad: int64 `[]`, padding token after the end of a sequence.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        options: dict[str, Any] = {"dtype": torch.long, "device": device}
        self.ids = torch.zeros(batch, capacity, **options)
        self.column = torch.zeros(1, **options)
        self.unfinished = torch.zeros(batch, **options)
        self.goes_on = torch.ones((), dtype=torch.bool, device=device)
        self.lasted = torch.zeros((), **options)
        self.ends = torch.full((ENDS,), -1, **options)
        self.pad = torch.zeros((), **options)

    def begin(self, prompt: Tensor, pad: Tensor | None, ends: Sequence[Tensor], lasted: int) -> None:
        """Start a generation.

        Args:
            prompt: int64 `[rows, T]`, token ids of the prompts.
            pad: int64 `[]`, padding token; None for 0.
            ends: end-of-sequence tokens, of which the first :data:`ENDS` are used.
            lasted: initial value of :attr:`lasted`.
        """
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
        model: a transformers causal LM, called within :func:`~effpass.runtime.attention.reading_cache`.
        batch: batch size B of the buffers; a generation with fewer sequences leaves the rest empty.
        capacity: number of slots of the buffers, for the tokens of prompt and answer together.
        backend: `torch.compile` backend for the decode step in the CUDA graph; None runs the model's own operators.

    Attributes:
        tokens: int64 `[B, 1]`, input of the next step.
        logits: `[B, vocab]`, logits of the prompt or of the last step without a tail; created by the first prompt.
        answer: state of the generation.
        rows: number of sequences in use.
        length: number of tokens per sequence that were entered into the cache, including padding (*logical length*).
        is_given: whether the user holds the cache.
        is_broken: whether a call that was given the cache failed or was cancelled; it then holds tokens of that call.
        gives_up: whether the cache evicts tokens; `prefill` then accepts `keep`, a mask of tokens to keep.
        inputs_of_tokens: additional inputs that `prefill` accepts with a prompt from a CUDA graph, `[rows, T, ...]`.
    """

    logits: Tensor
    gives_up = False
    inputs_of_tokens: frozenset[str] = frozenset()

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
        self.is_broken = False
        self._keeps_one = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        # The position of an unused sequence stays -1: its tokens are padding, which reads nothing and is never read.
        self._position = torch.full((batch, 1), -1, dtype=torch.int32, device=device)
        self._index = torch.zeros_like(self._position)  # for the model, where -1 is no valid index of a table
        self._moves = torch.zeros(batch, 1, dtype=torch.int32, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._key: tuple[Any, ...] | None = None  # cache plan and tail key of the graph
        self._model: Callable[..., Any] | None = None  # the model as the graph runs it
        self._compiled: list[Callable[..., Any]] = []
        self._prompts = PromptGraphs()
        self._features: list[Tensor] = []  # of the parts of a prompt, of sessions that return any
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
        """Restart with `rows` empty sequences."""
        self.cache.reset()
        self.rows = rows
        self.length = 0
        self._position.fill_(-1)
        self._index.zero_()
        self._moves.zero_()
        self._moves[:rows] = 1
        self._set_in_prompt(False)

    def prefill(self, input_ids: Tensor, is_token: Tensor | None, chunk: int, **inputs: Any) -> None:
        """Run the next prompt tokens of every sequence, and store the logits of the last ones in :attr:`logits`.

        Args:
            input_ids: int64 `[rows, T]`, token ids.
            is_token: bool `[rows, T]`, False for padding; None for no padding.
            chunk: number of tokens per sequence to run at once; with `inputs`, all tokens are run at once.
            inputs: additional inputs of the model, such as `pixel_values`.
        """
        positions, tokens = self._begin_prompt(input_ids, is_token), input_ids.shape[1]
        chunk = tokens if inputs else chunk
        for slots in self.cache.distinct_slots():
            slots.is_dense &= is_token is None
        is_short = tokens <= chunk and self.inputs_of_tokens.issuperset(inputs)
        if not is_short or not self._replay_prompt(input_ids, positions, inputs):
            for first in range(0, tokens, chunk):
                ids, part = input_ids[:, first : first + chunk], positions[:, first : first + chunk].contiguous()
                self._enter(part)
                self._keep_logits(self._call(self.model, ids, part.clamp(min=0), **inputs), 0)
        self._end_prompt(positions)

    def _begin_prompt(self, input_ids: Tensor, is_token: Tensor | None) -> Tensor:
        """Drop an outdated CUDA graph and return the next tokens' positions, int32 `[rows, T]`, -1 for padding."""
        self._drop_outdated()
        self._set_in_prompt(True)
        rows, tokens = input_ids.shape
        before = self._position[:rows]
        if is_token is None:
            positions = before + torch.arange(1, tokens + 1, dtype=torch.int32, device=before.device)
        else:
            positions = torch.where(is_token, before + is_token.cumsum(1, dtype=torch.int32), -1)
        return positions

    def _drop_outdated(self) -> None:
        if self._weights_moved():
            self._graph = self._model = None
        if any(isinstance(c, DerivedArguments) for c in self._compiled):
            self._graph = None  # replays would not update derived weights, which the caller of compiled code does

    def _keep_logits(self, logits: Tensor, row: int) -> None:
        if not hasattr(self, "logits"):
            self.logits = logits.new_zeros(self.batch, logits.shape[1])
        self.logits[row : row + len(logits)].copy_(logits)

    def _end_prompt(self, positions: Tensor) -> None:
        before = self._position[: len(positions)]
        before.copy_(positions.amax(1, keepdim=True).maximum(before))
        torch.clamp(self._position, min=0, out=self._index)
        self._set_in_prompt(False)
        self.cache.changed()

    def _set_in_prompt(self, value: bool) -> None:
        for slots in self.cache.distinct_slots():
            slots.in_prompt = value

    def positions(self) -> Tensor:
        """Return the position of each sequence's last token, int32 `[rows]`; -1 for a sequence without tokens."""
        return self._position[: self.rows, 0]

    def step(self, tail: Tail | None = None) -> None:
        """Run a decode step on :attr:`tokens`; the logits go to `tail`, or to :attr:`logits` if there is none."""
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

        The removed tokens must not include padding, and must be in the last slots of the cache.
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
        """Run the model and return the logits `[rows, vocab]` of the last tokens."""
        output = model(
            input_ids=input_ids,
            position_ids=index,
            **{cache_name(): self.cache},
            effpass_cache=self.cache,
            use_cache=True,
            return_dict=True,
            **{**self._keeps_one, **inputs},
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
        """Record a step as a CUDA graph, without a change of the state on the device."""
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
                step(None)  # without the tail: it ran after the prompt already, and may draw random numbers
                for tensor, value in zip(device_state, saved, strict=True):
                    tensor.copy_(value)

        with self._recording():
            self._graph = None  # free its memory first
            self._graph = record(lambda: step(tail), warm_up=try_out)

    # -- prompts from CUDA graphs ---------------------------------------------------------------------------------

    def _replay_prompt(self, input_ids: Tensor, positions: Tensor, inputs: dict[str, Tensor]) -> bool:
        """Run a prompt from a CUDA graph; return whether that is possible, and the size has occurred before."""
        (rows, tokens), size = input_ids.shape, padded_size(*input_ids.shape)
        if size is None or not self._can_replay(size):
            return False
        found = self._prompts.find(rows, size, lambda: self._record_prompt(rows, size, inputs))
        if found is None:
            return False
        found.run(input_ids, positions, inputs)
        self.cache.advance(size)
        if size > tokens:
            self.cache.crop(tokens - size)
        self.length += tokens
        self._keep_logits(found.logits, 0)
        if found.features is not None:
            self._features.append(found.features[:, :tokens].clone())
        return True

    def _can_replay(self, size: int) -> bool:
        return (
            self.model.device.type in _PROMPT_GRAPHS
            and self.length + size <= self.capacity
            and self.cache.takes_padding
            and bool(self._keeps_one)
            and not self.model._can_set_experts_implementation()  # experts wait, or exchange tokens with other ranks
            and can_be_recorded(self.model.config)
        )

    def _record_prompt(self, rows: int, size: int, inputs: dict[str, Tensor]) -> RecordedPrompt:
        device = self.model.device
        ids = torch.zeros(rows, size, dtype=torch.long, device=device)
        positions = torch.full((rows, size), -1, dtype=torch.int32, device=device)
        last = torch.zeros(1, dtype=torch.long, device=device)
        more = {name: given.new_zeros(rows, size, *given.shape[2:]) for name, given in inputs.items()}
        state = self.cache.state()
        saved, outputs = [t.clone() for t in state], list[Tensor]()

        def run() -> None:
            self._features.clear()
            self.cache.append(positions)
            logits = self._call(self.model, ids, positions.clamp(min=0), logits_to_keep=last, **more)
            if not outputs:
                outputs.extend(t.clone() for t in (logits, *self._features))
            else:
                torch._foreach_copy_(outputs, [logits, *self._features])

        def try_out() -> None:
            for _ in range(2):
                run()
                for tensor, value in zip(state, saved, strict=True):
                    tensor.copy_(value)

        with self._recording():
            graph = record(run, warm_up=try_out, pool=self._prompts.pool)
        self._features.clear()
        return RecordedPrompt(graph, ids, positions, last, outputs[0], outputs[1] if outputs[1:] else None, more)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        experts = getattr(self.model.config, "_experts_implementation", None)
        waits = experts in ("eager", "grouped_mm") and self.model._can_set_experts_implementation()
        if waits:  # these synchronize to learn how many tokens each expert has
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
        """Return `forward`, or else the model's forward, compiled for this session alone."""

        # No closure refers to the session, so that its buffers are freed with it and not by the garbage collector.
        compile_graph, kept, forward = self.backend, self._compiled, forward or self.model.forward
        assert compile_graph is not None

        def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            kept.append(compile_graph(gm, inputs))
            return kept[-1]

        def call(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        # Dynamo caches compiled code per code object. With a code object of its own, a session does not share guards
        # and the recompilation limit with other sessions.
        own = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
        return torch.compile(own, backend=backend, dynamic=False, fullgraph=True)

    def _weights_moved(self) -> bool:
        """Return whether weights have other addresses than at the last call, with which CUDA graphs are invalid."""
        before, self._weights = self._weights, tuple(p.data_ptr() for p in self.model.parameters())
        if before != self._weights:
            self._prompts.forget()
        return before != self._weights
