"""Area `speculative`: what rounds of speculative decoding take, and what they give on five sets of prompts.

The base is our own greedy decoding, whose steps are one CUDA graph as rounds are. Models of real shapes with random
weights say what things take; what is accepted is measured on the trained model that `--model` names, with the drafts in
EFFPASS_DRAFT (folders with commas, or ngram).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks import speculative_sparse, speculative_speed
from benchmarks.backend import _dtype
from benchmarks.rows import Row, row, sync
from benchmarks.speculative_common import AREA, Answering, _batches, _drafts, _ids, _model, _sets
from benchmarks.speculative_data import test_prompts, training_prompts

_TREES = ("chain:2", "chain:3", "chain:5", "eagle2:top_k=4,depth=3,nodes=8", "eagle2:top_k=4,depth=4,nodes=12",
          "eagle2:top_k=4,depth=5,nodes=16", "eagle2:top_k=8,depth=5,nodes=32")  # fmt: skip
_NODES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # sizes of EAGLE-2's trees on a curve
_TRIED = 6  # training prompts by which a tree is chosen


def _rates(runs: dict[str, Callable[[Tensor], Tensor]], prompts: Sequence[Tensor], device: str) -> dict[str, float]:
    """Tokens of answers a second over `prompts`, prompts included in the time; each prompt is answered by all in turn.

    All have answered everything once before, so that nobody meets a length, or a size of trees, for the first time.
    """
    for ids in prompts:
        for run in runs.values():
            run(ids)
    return _timed(runs, prompts, device)


def _timed(runs: dict[str, Callable[[Tensor], Tensor]], prompts: Sequence[Tensor], device: str) -> dict[str, float]:
    seconds, tokens = dict.fromkeys(runs, 0.0), dict.fromkeys(runs, 0)
    for ids in prompts:
        for name, run in runs.items():
            sync(device)
            started = time.perf_counter()
            found = run(ids)
            sync(device)
            seconds[name] += time.perf_counter() - started
            tokens[name] += found.shape[1] - ids.shape[1]
    return {name: tokens[name] / seconds[name] for name in runs}


class _Speculated:
    """Answers with a draft and a tree, and counts rounds, nodes and tokens."""

    def __init__(self, model: Any, draft: str, tree: str, longest: Tensor, fixed: dict[str, Any]) -> None:
        self.model, self.how, self.totals = model, {**fixed, "draft": draft, "tree": tree}, np.zeros(3)
        for _ in range(2):  # the first call records, and begins with plain steps
            model.generate(longest, **self.how)

    def __call__(self, ids: Tensor) -> Tensor:
        found = self.model.generate(ids, **self.how)
        last = self.model.effpass_engine.last_speculation
        self.totals += (last.rounds, last.verified, last.tokens)
        return found


def text(device: str, smoke: bool) -> Iterator[Row]:
    """Tokens a second on the five sets, by draft and tree, against our greedy decoding and transformers'.

    Answers end where the model ends them. The trees of each kind are the fastest of :data:`_TREES`, or of those in
    EFFPASS_TREES (with spaces between), on training prompts.
    """
    model, tokenizer, name = _model(device, smoke)
    count, new = (1, 16) if smoke else (int(os.environ.get("EFFPASS_PROMPTS", "16")), 512)
    fixed: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    own = type(model).generate
    sets = {of: [_ids(tokenizer, prompt, device) for prompt in test_prompts(of, count)] for of in _sets(smoke)}
    tried = [_ids(tokenizer, prompt, device) for prompt in training_prompts(1 if smoke else _TRIED, seed=1)]
    longest = max(chain(tried, *sets.values()), key=lambda ids: ids.shape[1])
    dtype = str(_dtype(device)).removeprefix("torch.")
    cases = {of: f"{name}, {of}, {len(prompts)} prompts, up to {new} tokens, {dtype}" for of, prompts in sets.items()}
    model.generate(longest, **fixed)  # records, with buffers for all
    base = "greedy decoding"
    runs: dict[str, Callable[[Tensor], Tensor]] = {base: lambda ids: model.generate(ids, **fixed)}
    for draft in _drafts():
        trees, candidates = ["chain:7"], {}
        if draft != "ngram":
            tried_trees = os.environ["EFFPASS_TREES"].split() if "EFFPASS_TREES" in os.environ else _TREES
            candidates = {
                tree: _Speculated(model, draft, tree, longest, fixed) for tree in tried_trees[:: 4 if smoke else 1]
            }
            rates = _rates(candidates, tried, device)  # type: ignore[arg-type]
            print(f"{draft}, tokens/s on {len(tried)} training prompts: {rates}", flush=True)
            kinds = ("chain", "eagle2")
            trees = [max((t for t in rates if t.startswith(kind)), key=rates.__getitem__) for kind in kinds]
            trees += ["c2t"] if Path(draft, "c2t").is_dir() else []
        for tree in trees:
            speculated = candidates.get(tree) or _Speculated(model, draft, tree, longest, fixed)
            runs[f"{Path(draft).name}, {tree}"] = speculated
    for of, prompts in sets.items():
        for run in runs.values():
            if isinstance(run, _Speculated):
                run.totals[:] = 0
        rates = _rates(runs, prompts, device)
        peer = {**fixed, "max_new_tokens": min(new, 128), "prompt_lookup_num_tokens": 7}
        theirs = _rates({"": lambda ids, how=peer: own(model, ids, **how)}, prompts[:1], device)[""]  # type: ignore[dict-item, misc]
        yield row(
            AREA, cases[of], base, rates[base], "tokens/s", device=device, peer=theirs,
            peer_name="transformers, prompt lookup of 7 tokens, 1 prompt, up to 128 tokens", lower_is_better=False,
            runs=len(prompts),
        )  # fmt: skip
        for name, run in runs.items():
            if isinstance(run, _Speculated):
                rounds, nodes, tokens = run.totals
                yield row(
                    AREA, cases[of], name, rates[name], "tokens/s", device=device, peer=rates[base],
                    peer_name="our greedy decoding", lower_is_better=False, runs=len(prompts),
                    note=f"{tokens / rounds:.2f} tokens a step, {nodes / rounds:.1f} nodes verified",
                )  # fmt: skip


def c2t(device: str, smoke: bool) -> Iterator[Row]:
    """Nodes that C2T verifies for a round's tokens, against EAGLE-2's trees of the same draft, interpolated.

    Both grow trees of EFFPASS_DEPTH layers with EFFPASS_TOP_K children a node.
    """
    model, tokenizer, name = _model(device, smoke)
    engine = model.effpass_engine
    count, new = (2, 16) if smoke else (int(os.environ.get("EFFPASS_PROMPTS", "32")), 128)
    top_k, depth = (int(os.environ.get(f"EFFPASS_{of}", usual)) for of, usual in (("TOP_K", "8"), ("DEPTH", "5")))
    nodes_of = (4, 16) if smoke else [n for n in _NODES if n <= 8 * top_k]
    betas = (0.2,) if smoke else (0.2, 0.4, 0.6, 0.7, 0.8, 0.9)
    grown = f"top_k={top_k},depth={depth},nodes="
    sets = {of: [_ids(tokenizer, prompt, device) for prompt in test_prompts(of, count)] for of in _sets(smoke)}
    width = max(ids.shape[1] for ids in chain(*sets.values()))
    batches = {of: _batches(prompts, width) for of, prompts in sets.items()}
    compiled, engine.backend = engine.backend, None  # counts alone: nothing is compiled
    try:
        for draft in _drafts():
            if not Path(draft, "c2t").is_dir():
                continue
            curves = [_counts(model, draft, f"eagle2:{grown}{n}", batches, new) for n in nodes_of]
            found = {b: _counts(model, draft, f"c2t:beta={b},{grown}{nodes_of[-1]}", batches, new) for b in betas}
            for of in sets:
                points = [(0.0, 1.0), *(curve[of] for curve in curves)]  # the root alone emits one token
                nodes, tokens = (np.array(x) for x in zip(*points, strict=True))
                case = f"{name}, {Path(draft).name}, top_k {top_k}, depth {depth}, {of}"
                for beta in betas:
                    mine = found[beta][of]
                    inside = tokens.min() <= mine[1] <= tokens.max()
                    equal = float(np.interp(mine[1], tokens, nodes)) if inside else None
                    note = f"{mine[1]:.3f} tokens a round"
                    if equal is not None:
                        note += f", {1 - mine[0] / equal:.1%} fewer nodes"
                    yield row(
                        AREA, case, f"nodes a round, β {beta}", mine[0], "", device=device, peer=equal,
                        peer_name="EAGLE-2's trees at the same tokens a round", runs=len(sets[of]),
                        note=f"{len(sets[of])} prompts x {new} tokens; {note}",
                    )  # fmt: skip
    finally:
        engine.backend = compiled


def _counts(
    model: Any, draft: str, tree: str, sets: dict[str, list[tuple[Tensor, Tensor]]], new: int
) -> dict[str, tuple[float, float]]:
    """Nodes verified and tokens emitted a round, over the prompts of each set."""
    answering = Answering(model, draft, tree, new)
    counts = {}
    for of, batches in sets.items():
        rounds, verified, tokens = answering(batches)[1]
        counts[of] = (verified / rounds, tokens / rounds)
    return counts


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    **speculative_speed.CASES,
    "text": text,
    "c2t": c2t,
    **speculative_sparse.CASES,
}
