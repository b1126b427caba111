"""Area `sparse_attention`: what trained models still answer when their decode steps attend to few keys.

A context is run with full attention; the question and the answer behind it are decode steps, so that every token that
counts was chosen for. All methods attend to as many keys. Where blocks alone lose nothing, a row is marked *no signal*.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

import numpy as np
import torch

from benchmarks.quality import SEEDS, _batches, _longest, _models
from benchmarks.rows import Row, row
from effpass.lowering.ops.two_level_attention_index import Selection
from effpass.passes.runtime.mla_absorption import absorb
from effpass.runtime.attention import reading_cache
from effpass.runtime.session import Session
from effpass.runtime.sparse_attention import SparseSettings
from effpass.trainers.lm.tasks import TASKS, make_example, shortest

__all__ = ["retention", "retention_variants"]

AREA = "sparse_attention"
FULL, OURS = "full attention", "two levels"


def retention(device: str, smoke: bool) -> Iterator[Row]:
    """Share of right answers with two levels, with blocks only and tokens only, beside full attention."""
    tokens, candidates, block = (48, 192, 16) if smoke else (512, 8192, 64)
    kinds: dict[str, Selection | None] = {
        FULL: None,
        OURS: Selection(tokens, candidates // block, block),
        "two levels, pipelined": Selection(tokens, candidates // block, block, is_pipelined=True),
        "blocks only": Selection(tokens, block=block, levels="blocks", recent=1),
        "tokens only": Selection(tokens, block=block, levels="tokens"),
    }
    yield from _asked(tuple(TASKS), tokens, kinds, device, smoke)


def retention_variants(device: str, smoke: bool) -> Iterator[Row]:
    """Other choices of blocks: more, smaller, by other statistics, and by the largest score over query heads."""
    tokens, keys, block = (48, 192, 16) if smoke else (512, 8192, 64)
    kinds: dict[str, Selection | None] = {
        FULL: None,
        "blocks only": Selection(tokens, block=block, levels="blocks", recent=1),
        f"two levels of {2 * keys} keys": Selection(tokens, 2 * keys // block, block),
        "two levels by means": Selection(tokens, keys // block, block, statistic="mean"),
        "two levels by mean and deviation": Selection(tokens, keys // block, block, statistic="mean_std"),
        "two levels, blocks of 32": Selection(tokens, keys // 32, 32),
        "two levels, blocks of 16": Selection(tokens, keys // 16, 16),
        "two levels, blocks of 16, by mean and deviation": Selection(tokens, keys // 16, 16, statistic="mean_std"),
        "two levels, largest over heads": Selection(tokens, keys // block, block, aggregation="max"),
    }
    yield from _asked(("needle", "copy", "frequent"), tokens, kinds, device, smoke)


def _asked(
    tasks: Sequence[str], tokens: int, kinds: dict[str, Selection | None], device: str, smoke: bool
) -> Iterator[Row]:
    for model, tokenizer, name in _models(device, smoke):
        absorb(model)
        length = min(_longest(model), int(os.environ.get("EFFPASS_PROMPT", 256 if smoke else 32768)))
        for task in tasks:
            if length >= shortest(task, {}):
                yield from _task(model, tokenizer, name, task, length, tokens, kinds, device, smoke)


def _task(
    model: Any, tokenizer: Any, name: str, task: str, length: int, tokens: int, kinds: dict[str, Selection | None],
    device: str, smoke: bool,
) -> Iterator[Row]:  # fmt: skip
    count, batch = (2, 2) if smoke else (32, 8)
    right: dict[str, list[float]] = {kind: [] for kind in kinds}
    with torch.no_grad(), reading_cache(model):
        for kind, how in kinds.items():
            session = _session(model, batch, length, how)
            for seed in SEEDS:
                rngs = [np.random.default_rng((seed, length, i)) for i in range(count)]
                examples = [make_example(task, rng, length, 1, {}) for rng in rngs]
                found: list[bool] = []
                for context, question, answer in _batches(model, tokenizer, examples):
                    for some in zip(*(x.split(batch) for x in (context, question, answer)), strict=True):
                        found += _answers(session, *some)
                right[kind].append(100 * mean(found))
            del session
    full = mean(right[FULL])
    loses = full - mean(right["blocks only"])
    for kind, values in right.items():
        spread = f"{min(values):.1f} to {max(values):.1f} over {len(SEEDS)} seeds"
        what, peer = (kind, None) if kind == FULL else (f"{kind}, {tokens} keys", full)
        yield row(
            AREA, f"{name}, {task}, {length} bytes", f"answers right, {what}", mean(values), "%", device=device,
            peer=peer, peer_name="" if peer is None else FULL, lower_is_better=False, runs=count * len(SEEDS),
            note=spread + ("" if full >= 20 and loses >= 5 else "; no signal"),
        )  # fmt: skip


def _session(model: Any, batch: int, length: int, how: Selection | None) -> Session:
    if how is None:
        return Session(model, batch, length, None)
    model.effpass_reader = SparseSettings(how, dense_below=1)
    try:
        return Session(model, batch, length, None)
    finally:
        del model.effpass_reader


def _answers(session: Session, context: torch.Tensor, question: torch.Tensor, answer: torch.Tensor) -> list[bool]:
    """Whether each answer is what greedy decoding gives, every token of it."""
    rows = context.shape[0]
    session.begin(rows)
    session.prefill(context, None, 1 << 15)
    tail, chosen = torch.cat([question, answer[:, :-1]], 1), []
    for at in range(tail.shape[1]):
        session.tokens[:rows] = tail[:, at : at + 1]
        session.step()
        chosen.append(session.logits[:rows].argmax(-1))
    return (torch.stack(chosen[-answer.shape[1] :], 1) == answer).all(1).tolist()
