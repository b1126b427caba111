"""Area `speculative`: what rounds of speculative decoding take, and what they give on five sets of prompts.

The base is our own greedy decoding, whose steps are one CUDA graph as rounds are. Models of real shapes with random
weights say what things take; what is accepted is measured on the trained model that `--model` names, with the drafts in
EFFPASS_DRAFT (folders with commas, or ngram).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks import speculative_sparse, speculative_speed
from benchmarks.backend import _dtype
from benchmarks.rows import Row, row, sync
from benchmarks.speculative_common import AREA, _drafts, _ids, _model, _sets
from benchmarks.speculative_data import test_prompts
from effpass.runtime.speculative import Speculator
from effpass.runtime.speculative.generation import generate
from effpass.runtime.speculative.open_draft import open_draft


def _rate(run: Callable[[Tensor], Any], prompts: Sequence[Tensor], new: int, device: str) -> float:
    """Tokens a second over `prompts`, prompts included in the time."""
    seconds = 0.0
    for ids in prompts:
        sync(device)
        started = time.perf_counter()
        run(ids)
        sync(device)
        seconds += time.perf_counter() - started
    return new * len(prompts) / seconds


def text(device: str, smoke: bool) -> Iterator[Row]:
    """Tokens a second on the five sets, by draft and tree, against our greedy decoding and transformers'."""
    model, tokenizer, name = _model(device, smoke)
    count, new = (1, 16) if smoke else (int(os.environ.get("EFFPASS_PROMPTS", "8")), 128)
    fixed: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    own = type(model).generate
    for prompts_of in _sets(smoke):
        prompts = [_ids(tokenizer, prompt, device) for prompt in test_prompts(prompts_of, count)]
        longest = max(prompts, key=lambda ids: ids.shape[1])
        model.generate(longest, **fixed)  # records, with buffers for all
        base = _rate(lambda ids: model.generate(ids, **fixed), prompts, new, device)
        theirs = _rate(lambda ids: own(model, ids, **fixed, prompt_lookup_num_tokens=7), prompts[:2], new, device)
        case = f"{name}, {prompts_of}, {count} prompts x {new} tokens, {_dtype(device)}".replace("torch.", "")
        yield row(
            AREA, case, "greedy decoding", base, "tokens/s", device=device, peer=theirs,
            peer_name="transformers, prompt lookup of 7 tokens, 2 prompts", lower_is_better=False, runs=count,
        )  # fmt: skip
        for draft in _drafts():
            trees = ["chain:7"] if draft == "ngram" else ["chain:5", "eagle2"]
            if draft != "ngram" and Path(draft, "c2t").is_dir():
                trees.append("c2t")
            for tree in trees:
                how = {**fixed, "draft": draft, "tree": tree}
                for _ in range(2):  # the first call records, and begins with plain steps
                    model.generate(longest, **how)
                totals = np.zeros(3)

                def run(ids: Tensor, how: Any = how, totals: Any = totals) -> None:
                    model.generate(ids, **how)
                    found = model.effpass_engine.last_speculation
                    totals += (found.rounds, found.verified, found.tokens)

                rate = _rate(run, prompts, new, device)
                rounds, nodes, tokens = totals
                yield row(
                    AREA, case, f"{Path(draft).name}, {tree}", rate, "tokens/s", device=device, peer=base,
                    peer_name="our greedy decoding", lower_is_better=False, runs=count,
                    note=f"{tokens / rounds:.2f} tokens a step, {nodes / rounds:.1f} nodes verified",
                )  # fmt: skip


def c2t(device: str, smoke: bool) -> Iterator[Row]:
    """Nodes that C2T verifies for a round's tokens, against EAGLE-2's trees of the same draft, interpolated."""
    model, tokenizer, name = _model(device, smoke)
    engine = model.effpass_engine
    count, new = (1, 16) if smoke else (int(os.environ.get("EFFPASS_PROMPTS", "8")), 96)
    sizes = (4, 16) if smoke else (4, 8, 12, 16, 24, 32, 48, 64)
    betas = (0.2,) if smoke else (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    compiled, engine.backend = engine.backend, None  # counts alone: nothing is compiled
    try:
        for draft in _drafts():
            if not Path(draft, "c2t").is_dir():
                continue
            for prompts_of in _sets(smoke):
                prompts = [_ids(tokenizer, prompt, device) for prompt in test_prompts(prompts_of, count)]
                curve = [_counts(model, draft, f"eagle2:nodes={n}", prompts, new) for n in sizes]
                nodes, tokens = (np.array(x) for x in zip(*curve, strict=True))
                for beta in betas:
                    mine = _counts(model, draft, f"c2t:nodes=64,beta={beta}", prompts, new)
                    inside = tokens.min() <= mine[1] <= tokens.max()
                    equal = float(np.interp(mine[1], tokens, nodes)) if inside else None
                    note = f"{mine[1]:.3f} tokens a round"
                    if equal is not None:
                        note += f", {1 - mine[0] / equal:.1%} fewer nodes"
                    yield row(
                        AREA, f"{name}, {Path(draft).name}, {prompts_of}, {count} prompts x {new} tokens",
                        f"nodes a round, β {beta}", mine[0], "", device=device, peer=equal,
                        peer_name="EAGLE-2's trees at the same tokens a round", runs=count, note=note,
                    )  # fmt: skip
    finally:
        engine.backend = compiled


def _counts(model: Any, draft: str, tree: str, prompts: Sequence[Tensor], new: int) -> tuple[float, float]:
    """Nodes verified and tokens emitted a round, over prompts."""
    speculator = Speculator(model.effpass_engine, open_draft(model.effpass_engine, draft, tree), switches=False)
    totals = np.zeros(3)

    def loop(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
        return generate(speculator, input_ids, **prepared)

    for ids in sorted(prompts, key=lambda ids: -ids.shape[1]):  # buffers for the longest serve all
        type(model).generate(
            model, ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, custom_generate=loop
        )
        found = speculator.last
        assert found is not None
        totals += (found.rounds, found.verified, found.tokens)
    return totals[1] / totals[0], totals[2] / totals[0]


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    **speculative_speed.CASES,
    "text": text,
    "c2t": c2t,
    **speculative_sparse.CASES,
}
