"""Area `speculative`, cases `sparse` and `sparse_text`: verification that leaves out, against a dense one.

Times are those of one call on a tree, of models of real shapes with random weights; both sides are CUDA graphs of the
same session. What is lost is measured on the trained model that `--model` names with the drafts in EFFPASS_DRAFT.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import kl_div

import effpass
from benchmarks.backend import _dtype, _free, _weight_bytes
from benchmarks.decode import NO_PASSES, _cache_bytes
from benchmarks.rows import Row, bandwidth, measure_pair, row
from benchmarks.shapes import random_model
from benchmarks.speculative_common import AREA, _captured, _drafts, _ids, _model, _parents, _sets
from benchmarks.speculative_data import test_prompts
from effpass.lowering.ops.ancestors import relations
from effpass.lowering.ops.tree_growth import positions_at
from effpass.passes.runtime.sparse_verification import SparseVerificationOptions, SparseVerificationPass
from effpass.runtime.attention import reading_cache
from effpass.runtime.speculative.session import TreeSession
from effpass.runtime.speculative.shared_channels import gated_networks
from effpass.runtime.speculative.shared_experts import expert_modules
from effpass.runtime.speculative.sparse import ROOM, settings_of

PARTS: dict[str, Any] = {"attention": 0.25, "channels": 0.5, "experts": 0.5}
NODES = 60


def _leave_out(model: Any, **options: Any) -> None:
    """From here on verifications of `model` are sparse; without options dense."""
    if hasattr(model, ROOM):
        delattr(model, ROOM)
    model.effpass_engine.release()
    if options:
        made = SparseVerificationPass(SparseVerificationOptions(**{"attention": None, **options}))
        made.check_model(model)
        made.prepare(model)


def _combinations(model: Any, most: int) -> list[dict[str, float]]:
    """Parts that the model has, each alone, each pair and all three."""
    has = {
        "attention": True,
        "channels": bool(gated_networks(model)[0]),
        "experts": bool(expert_modules(model)),
    }
    names = [name for name, there in has.items() if there]
    subsets = [[n for i, n in enumerate(names) if bits >> i & 1] for bits in range(1, 1 << len(names))]
    return [{n: PARTS[n] for n in s} for s in sorted(subsets, key=len) if len(s) <= most]


def _told(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in options.items() if name in PARTS)


# -- time --------------------------------------------------------------------------------------------------------------


def sparse(device: str, smoke: bool) -> Iterator[Row]:
    """One call on a tree of 60 nodes behind long prefixes, and of a model with experts; sparse against dense."""
    small = smoke or device == "cpu"
    shapes = os.environ.get("EFFPASS_SHAPES", "llama-3.1-8b").split(",")
    for shape in ["tiny", "tiny-moe"] if small else shapes:
        prefixes = (128, 256) if small else (4096, 32768) if "30b" in shape else (32768, 65536)
        longest = {"max_position_embeddings": max(prefixes) + 512}
        model = effpass.prepare(random_model(shape, device, _dtype(device), **longest), NO_PASSES)
        wanted = os.environ.get("EFFPASS_PARTS")  # names with commas: one combination a call, where time is short
        for options in _combinations(model, 3):
            if wanted and set(wanted.split(",")) != set(options):
                continue
            _leave_out(model, **options, **({"dense_below": 64} if small else {}))
            for prefix, ours, theirs in _calls(model, prefixes, device, smoke):
                case = f"{shape}, {_dtype(device)}, batch 1, prefix {prefix}, {NODES} nodes".replace("torch.", "")
                whole = (_weight_bytes(model) + _cache_bytes(model, prefix)) / bandwidth(device)
                yield row(
                    AREA, case, f"verify, {_told(options)}", ours * 1e3, "ms", device=device, peer=theirs * 1e3,
                    peer_name="dense, the same session", runs=15,
                    note=f"reading all of it takes {whole * 1e3:.2f} ms",
                )  # fmt: skip
            _free(device)
        del model
        _free(device)


def _calls(model: Any, prefixes: Sequence[int], device: str, smoke: bool) -> Iterator[tuple[int, float, float]]:
    """Prefix, seconds of a sparse and of a dense call; the same two graphs for all prefixes."""
    session = TreeSession(model, 1, max(prefixes) + 256, NODES, model.effpass_engine.backend, (), settings_of(model))
    depths, ancestors = relations(_parents(NODES, 8, device), 8)
    root = torch.zeros(1, dtype=torch.int32, device=device)
    positions = positions_at(root, depths)
    tokens = torch.randint(5, model.config.vocab_size, (1, NODES), device=device)
    calls: list[Callable[[], Any]] = []
    with torch.no_grad(), reading_cache(model), session.attached():
        for prefix in prefixes:
            session.begin(1)
            session.prefill(torch.randint(5, model.config.vocab_size, (1, prefix), device=device), None, 4096)
            session.cache.begin_tree()
            positions.copy_(positions_at(root + prefix, depths))
            if not calls:
                with session.recording():
                    calls = [
                        _captured(lambda s=s: session.run(tokens, positions, ancestors, is_sparse=s), device)  # type: ignore[misc]
                        for s in (True, False)
                    ]
            times = measure_pair(*calls, device, runs=3 if smoke else 15, inner=1 if device == "cpu" else 10)
            yield prefix, times[0].median, times[1].median


# -- loss --------------------------------------------------------------------------------------------------------------


def sparse_text(device: str, smoke: bool) -> Iterator[Row]:
    """What sparse verification costs: tokens a round, divergence of distributions, and likelihood of what comes out."""
    model, tokenizer, name = _model(device, smoke)
    count, new = (1, 16) if smoke else (int(os.environ.get("EFFPASS_PROMPTS", "8")), 128)
    below = 32 if smoke else int(os.environ.get("EFFPASS_DENSE_BELOW", "128"))
    fixed: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    try:
        for prompts_of in _sets(smoke):
            prompts = [_ids(tokenizer, prompt, device) for prompt in test_prompts(prompts_of, count)]
            for draft in _drafts():
                how = {**fixed, "draft": draft} if draft == "ngram" else {**fixed, "draft": draft, "tree": "eagle2"}
                _leave_out(model)
                texts, tokens_a_round = _texts(model, prompts, how)
                nats = _nats(model, texts, prompts)
                for options in _combinations(model, 3):
                    _leave_out(model, **options, dense_below=below)
                    mine, rate = _texts(model, prompts, how)
                    between = _divergence(model, texts, prompts)
                    same = np.mean([_same(*of) for of in zip(mine, texts, prompts, strict=True)])
                    _leave_out(model)
                    case = f"{name}, {prompts_of}, {count} prompts x {new} tokens, {Path(draft).name}, {_told(options)}"
                    yield row(
                        AREA, case, "tokens a round", rate, "", device=device, peer=tokens_a_round,
                        peer_name="dense verification", lower_is_better=False, runs=count,
                        note=f"{same:.0%} of the tokens before texts part",
                    )  # fmt: skip
                    yield row(
                        AREA, case, "the model's loss on the text", _nats(model, mine, prompts), "nats", device=device,
                        peer=nats, peer_name="on dense verification's text", runs=count,
                        note=f"KL(dense, sparse) of a node: {between:.4f} nats",
                    )  # fmt: skip
    finally:
        _leave_out(model)


def _texts(model: Any, prompts: Sequence[Tensor], how: dict[str, Any]) -> tuple[list[Tensor], float]:
    """Texts with their prompts, `[1, T]` each, and tokens a round."""
    texts, totals = [], np.zeros(2)
    for ids in prompts:
        texts.append(model.generate(ids, **how))
        found = model.effpass_engine.last_speculation
        totals += (found.rounds, found.tokens)
    return texts, totals[1] / totals[0]


def _same(mine: Tensor, theirs: Tensor, prompt: Tensor) -> float:
    """Share of the answer's tokens in front of the first that differs."""
    differ = (mine[0, prompt.shape[1] :] != theirs[0, prompt.shape[1] :]).int()
    first = int(differ.argmax()) if bool(differ.any()) else len(differ)
    return first / len(differ)


@torch.no_grad()
def _nats(model: Any, texts: Sequence[Tensor], prompts: Sequence[Tensor]) -> float:
    """The model's own loss on a token of the answers."""
    losses = []
    for text, prompt in zip(texts, prompts, strict=True):
        log_p = model(text, use_cache=False).logits[0, prompt.shape[1] - 1 : -1].float().log_softmax(-1)
        losses.append(-log_p.gather(1, text[0, prompt.shape[1] :, None]).mean())
    return float(torch.stack(losses).mean())


def _divergence(model: Any, texts: Sequence[Tensor], prompts: Sequence[Tensor]) -> float:
    """KL(dense, sparse) of a node in nats: the first 32 tokens of each answer are the nodes of one path."""
    nodes, found = 32, []
    for text, prompt in zip(texts, prompts, strict=True):
        length, device = prompt.shape[1], text.device
        count = min(nodes, text.shape[1] - length)
        session = TreeSession(model, 1, length, count, None, (), settings_of(model))
        path = torch.arange(-1, count - 1, device=device)[None]
        depths, ancestors = relations(path, count)
        positions = positions_at(torch.tensor([length], dtype=torch.int32, device=device), depths)
        tokens = text[:, length : length + count]
        with torch.no_grad(), reading_cache(model), session.attached():
            session.begin(1)
            session.prefill(prompt, None, 4096)
            session.cache.begin_tree()
            dense, thin = (
                session.run(tokens, positions, ancestors, is_sparse=s)[0][0].float().log_softmax(-1)
                for s in (False, True)
            )
        found.append(kl_div(thin, dense, reduction="batchmean", log_target=True))
    return float(torch.stack(found).mean())


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {"sparse": sparse, "sparse_text": sparse_text}
