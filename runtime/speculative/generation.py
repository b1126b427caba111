"""The generation loop of speculative decoding, called by transformers' `generate`.

A *round* (:mod:`effpass.runtime.speculative.round`) drafts a tree and verifies it. As in plain generation, the host
queues rounds without waiting for the device, and learns a few rounds late how many tokens each sequence has and whether
all have ended.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from effpass.core.cache_name import CACHE_NAMES
from effpass.core.errors import EffpassError
from effpass.runtime.generation import check_config, check_positions, new_tokens, tokens_of
from effpass.runtime.speculative.pace import Pace
from effpass.runtime.speculative.round import Round
from effpass.runtime.speculative.speculator import Speculation, Speculator
from effpass.runtime.speculative.walk import check_processors

__all__ = ["generate"]

_IN_FLIGHT = 2  # rounds that may be pending; those beyond the end emit nothing


def generate(
    speculator: Speculator,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Decode greedily or sample; transformers calls this function with everything that it has prepared.

    Args:
        speculator: speculative decoder of the model with a draft.
        input_ids: int64 `[B, T]`, token ids of the prompts, padded on the left.
        logits_processor: processors to apply to the logits of each node.
        stopping_criteria: stopping criteria, one of which bounds the length.
        generation_config: config that transformers prepared.
        streamer: object that receives the tokens of each column, int64 `[B]` on the CPU, once all sequences have
            reached it; None for no streaming.
        model_kwargs: `attention_mask` `[B, T]`.

    Returns:
        The sequences, int64 `[B, T + new]`, padded after their ends. Greedy decoding returns the tokens of plain
        decoding, up to rounding; samples have the distribution of plain sampling. With `return_dict_in_generate`, an
        output without cache.

    Raises:
        EffpassError: as in plain generation, and for a cache of an earlier call, images, scores or logits to return,
            and processors that depend on the index of a sequence in the batch.
    """
    engine, draft = speculator.engine, speculator.draft
    check_config(generation_config, model_kwargs)
    _check_speculative(generation_config, model_kwargs)
    ids = input_ids.to(engine.device)
    is_token = tokens_of(ids, model_kwargs.get("attention_mask"))
    check_positions(model_kwargs.get("position_ids"), is_token, ids.shape[1])
    rows, length = ids.shape
    check_processors(logits_processor, rows)
    limit = length + new_tokens(engine.model, length, stopping_criteria)
    chunk = max(1, engine.prefill_tokens // rows)
    with torch.inference_mode(False), torch.no_grad(), speculator.round(rows, limit) as (round_, pace):
        round_.target.prefill(ids, is_token, chunk)
        round_.drafting.begin(ids, is_token, chunk)
        round_.begin(ids, logits_processor, stopping_criteria, generation_config, limit)
        progress = round_.progress
        watch = _Watch(round_, rows, length, pace, streamer)
        behind = 0  # maximum number of emitted tokens that the draft has not run
        pace.begin()
        while not watch.has_ended:
            speculates = pace.next()
            if behind >= draft.kind.catches_up or (speculates and behind > 0):
                round_.catch_up()
                behind = 0
            nodes = round_.size.nodes if speculates else 1
            round_.step(nodes=nodes, plain=not speculates, reached=watch.reached)
            behind = 0 if speculates or pace.has_given_up else behind + 1
            watch.look(nodes, plain=not speculates)
        watch.finish()
        counts = progress.count[:rows]
        rounds, verified = progress.totals.tolist()
        tokens = int((counts - length).sum()) - rows
        speculator.last = engine.last_speculation = Speculation(rounds, verified, tokens)
        sequences = progress.ids[:rows, : int(counts.max())].clone()
    return GenerateDecoderOnlyOutput(sequences=sequences) if generation_config.return_dict_in_generate else sequences  # type: ignore[arg-type]


class _Step(NamedTuple):
    """A step that was queued."""

    nodes: int
    plain: bool
    is_timed: bool


class _Watch:
    """Observes the lengths of the sequences without synchronization, and informs the streamer and the pace."""

    def __init__(self, round_: Round, rows: int, length: int, pace: Pace, streamer: Any) -> None:
        self._round, self._rows, self._pace, self._streamer = round_, rows, pace, streamer
        self._is_cuda = round_.progress.ids.is_cuda
        self._counts = [length] * rows
        self._shown = length
        self._before: Any = None
        self._waiting: deque[tuple[Any, ...]] = deque()
        self._free: list[list[Tensor]] = []
        self.has_ended = False
        self.look(1, plain=True)

    def look(self, nodes: int, *, plain: bool) -> None:
        """Start to copy the state of the step that was just queued, and read the copies that have completed.

        Args:
            nodes: number of nodes that the step verified, with the root.
            plain: whether it was a plain step.
        """
        progress, step = self._round.progress, _Step(nodes, plain, not self._round.was_recorded)
        state = [progress.count[: self._rows], progress.position[: self._rows], self._round.largest]
        if self._streamer is not None:
            state.append(progress.ids[: self._rows])
        if not self._is_cuda:
            self._take(step, [t.clone() for t in state], time.perf_counter())
            return
        copies = self._free.pop() if self._free else [torch.empty_like(t, device="cpu", pin_memory=True) for t in state]
        for copy, tensor in zip(copies, state, strict=True):
            copy.copy_(tensor, non_blocking=True)
        arrived = torch.cuda.Event(enable_timing=True)
        arrived.record()
        self._waiting.append((step, copies, arrived))
        while self._waiting and (len(self._waiting) > _IN_FLIGHT or self._waiting[0][2].query()):
            self._arrive()

    @property
    def reached(self) -> int:
        """Number of tokens of the longest sequence, as last read from the device."""
        return max(self._counts)

    def finish(self) -> None:
        while self._waiting:
            self._arrive()
        if self._streamer is not None:
            self._streamer.end()

    def _arrive(self) -> None:
        step, copies, arrived = self._waiting.popleft()
        arrived.synchronize()
        self._take(step, copies, arrived)
        self._free.append(copies)

    def _take(self, step: _Step, state: list[Tensor], now: Any) -> None:
        if self.has_ended:
            return
        counts, positions = state[0].tolist(), state[1].tolist()
        moved = [new - old for new, old in zip(counts, self._counts, strict=True) if new > old]
        before = self._before
        if before is not None and moved:
            seconds = before.elapsed_time(now) / 1e3 if self._is_cuda else now - before
            self._pace.saw(plain=step.plain, seconds=seconds if step.is_timed else None, gain=sum(moved) / len(moved))
            if not step.plain:
                self._round.size.saw(step.nodes, int(state[2]))
        self._counts, self._before = counts, now
        self.has_ended = max(positions) < 0
        if self._streamer is not None:
            # Sequences that have ended do not count: they are padded to the length of the longest one.
            least = min((c for c, p in zip(counts, positions, strict=True) if p >= 0), default=max(counts))
            for column in range(self._shown, least):
                self._streamer.put(state[3][:, column].clone())
            self._shown = max(self._shown, least)


def _check_speculative(config: Any, model_kwargs: dict[str, Any]) -> None:
    refused = {
        "output_scores": config.return_dict_in_generate and config.output_scores,
        "output_logits": config.return_dict_in_generate and config.output_logits,
        "cache of an earlier call": any(hasattr(model_kwargs.get(name), "session") for name in CACHE_NAMES),
    }
    for name, given in refused.items():
        if given:
            raise EffpassError(f"speculative decoding has no {name}", hint="leave the draft out of this call")
