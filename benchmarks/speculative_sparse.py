"""Area `speculative`, cases `sparse…`: verification that leaves out, against a dense one.

Times are those of one call on a tree, of models of real shapes with random weights; both sides are CUDA graphs of the
same session. What is lost is measured on the trained model that `--model` names with the drafts in EFFPASS_DRAFT.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
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
from benchmarks.speculative_common import AREA, Answering, _batches, _captured, _drafts, _ids, _model, _parents, _sets
from benchmarks.speculative_data import test_prompts
from effpass.lowering.ops.ancestors import relations
from effpass.lowering.ops.tree_blocks import PARTS as PARTS_OF_ONE
from effpass.lowering.ops.tree_blocks import most_blocks
from effpass.lowering.ops.tree_growth import positions_at
from effpass.passes.runtime.sparse_verification import SparseVerificationOptions, SparseVerificationPass
from effpass.runtime.attention import reading_cache
from effpass.runtime.speculative.session import TreeSession
from effpass.runtime.speculative.shared_channels import gated_networks
from effpass.runtime.speculative.shared_experts import expert_modules
from effpass.runtime.speculative.sparse import ROOM, settings_of
from effpass.trainers.lm.tasks import TASKS, make_example

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
        if expert_modules(model):  # tokens that differ in all layers, or they would meet the same experts
            model.get_input_embeddings().weight.normal_(std=30)
        wanted = os.environ.get("EFFPASS_PARTS")  # names with commas: one combination a call, where time is short
        for options in _combinations(model, 3):
            if wanted and set(wanted.split(",")) != set(options):
                continue
            _leave_out(model, **options, **({"dense_below": 64} if small else {}))
            for prefix, ours, theirs, met in _calls(model, prefixes, device, smoke):
                case = f"{shape}, {_dtype(device)}, batch 1, prefix {prefix}, {NODES} nodes".replace("torch.", "")
                part, whole = _bytes(model, prefix, options)
                experts = f"; experts of a layer that are read: {met[0]:.1f}, dense {met[1]:.1f}" if met else ""
                yield row(
                    AREA, case, f"verify, {_told(options)}", ours * 1e3, "ms", device=device, peer=theirs * 1e3,
                    peer_name="dense, the same session", runs=15,
                    note=f"reads {part / 1e9:.2f} of {whole / 1e9:.2f} GB, counted; reading all of it takes "
                    f"{whole / bandwidth(device) * 1e3:.2f} ms{experts}",
                )  # fmt: skip
            _free(device)
        del model
        _free(device)


def _bytes(model: Any, prefix: int, options: dict[str, float]) -> tuple[float, float]:
    """Bytes of weights and cache that a sparse and a dense verification read, if all experts are used."""
    weights, cache = _weight_bytes(model), _cache_bytes(model, prefix)
    settings = settings_of(model)
    part = float(weights + cache)
    if settings is not None and settings.blocks is not None:
        blocks = settings.blocks
        kept = most_blocks(prefix, blocks.block, blocks.dense_below, round(blocks.share * PARTS_OF_ONE))
        part -= cache * (1 - min(1.0, kept * blocks.block / prefix))
    networks, experts = gated_networks(model)[0].values(), expert_modules(model).values()
    if "channels" in options:  # the gate is read whole
        part -= sum(map(_weight_bytes, networks)) * 2 / 3 * (1 - options["channels"])
    if "experts" in options:
        part -= sum(map(_weight_bytes, experts)) * (1 - options["experts"])
    return part, weights + cache


def _calls(
    model: Any, prefixes: Sequence[int], device: str, smoke: bool
) -> Iterator[tuple[int, float, float, list[float]]]:
    """Prefix, seconds of a sparse and of a dense call, and the experts that each reads, of a model that has any.

    The two graphs are the same for all prefixes.
    """
    session = TreeSession(model, 1, max(prefixes) + 256, NODES, model.effpass_engine.backend, (), settings_of(model))
    depths, ancestors = relations(_parents(NODES, 8, device), 8)
    root = torch.zeros(1, dtype=torch.int32, device=device)
    positions = positions_at(root, depths)
    tokens = torch.randint(5, model.config.vocab_size, (1, NODES), device=device)
    calls: list[Callable[[], Any]] = []
    met: list[float] = []
    with torch.no_grad(), reading_cache(model), session.attached():
        for prefix in prefixes:
            session.begin(1)
            session.prefill(torch.randint(5, model.config.vocab_size, (1, prefix), device=device), None, 4096)
            session.cache.begin_tree()
            positions.copy_(positions_at(root + prefix, depths))
            if not calls:
                met = _experts_met(model, lambda s: session.run(tokens, positions, ancestors, is_sparse=s))
                with session.recording():
                    calls = [
                        _captured(lambda s=s: session.run(tokens, positions, ancestors, is_sparse=s), device)  # type: ignore[misc]
                        for s in (True, False)
                    ]
            times = measure_pair(*calls, device, runs=3 if smoke else 15, inner=1 if device == "cpu" else 10)
            yield prefix, times[0].median, times[1].median, met


def _experts_met(model: Any, run: Callable[[bool], Any]) -> list[float]:
    """Mean number of a layer's experts with a weight in a sparse and in a dense run; empty without experts."""
    modules, found = expert_modules(model).values(), []
    for is_sparse in (True, False) if modules else ():
        met: list[int] = []

        def count(module: Any, args: tuple[Tensor, ...], met: list[int] = met) -> None:
            met.append(len(args[1][args[2] > 0].unique()))

        handles = [module.register_forward_pre_hook(count) for module in modules]
        run(is_sparse)
        for handle in handles:
            handle.remove()
        found.append(float(np.mean(met)))
    return found


# -- loss --------------------------------------------------------------------------------------------------------------


def sparse_text(device: str, smoke: bool) -> Iterator[Row]:
    """What sparse verification costs: tokens a round, divergence of distributions, and likelihood of what comes out."""
    model, tokenizer, name = _model(device, smoke)
    count, new = (1, 16) if smoke else (int(os.environ.get("EFFPASS_PROMPTS", "16")), 128)
    below = 32 if smoke else int(os.environ.get("EFFPASS_DENSE_BELOW", "128"))
    sets = {of: [_ids(tokenizer, prompt, device) for prompt in test_prompts(of, count)] for of in _sets(smoke)}
    width = max(ids.shape[1] for ids in chain(*sets.values()))
    batches = {of: _batches(prompts, width) for of, prompts in sets.items()}
    with _counting(model):
        for draft in _drafts():
            tree = None if draft == "ngram" else "eagle2"
            dense = _answers(model, draft, tree, batches, new, {})
            nats = {of: _nats(model, texts, sets[of]) for of, (texts, _) in dense.items()}
            for options in _combinations(model, 3):
                thin = _answers(model, draft, tree, batches, new, {**options, "dense_below": below})
                apart = {of: _divergence(model, texts, sets[of]) for of, (texts, _) in dense.items()}
                _leave_out(model)
                for of, prompts in sets.items():
                    texts, rate = thin[of]
                    same = np.mean([_same(*each) for each in zip(texts, dense[of][0], prompts, strict=True)])
                    case = f"{name}, {of}, {count} prompts x {new} tokens, {Path(draft).name}, {_told(options)}"
                    yield row(
                        AREA, case, "tokens a round", rate, "", device=device, peer=dense[of][1],
                        peer_name="dense verification", lower_is_better=False, runs=count,
                        note=f"{same:.0%} of the tokens before texts part",
                    )  # fmt: skip
                    yield row(
                        AREA, case, "the model's loss on the text", _nats(model, texts, prompts), "nats",
                        device=device, peer=nats[of], peer_name="on dense verification's text", runs=count,
                        note=f"KL(dense, sparse) of a node: {apart[of]:.4f} nats",
                    )  # fmt: skip


def sparse_tasks(device: str, smoke: bool) -> Iterator[Row]:
    """Share of right answers to the tasks of area `quality`, with sparse and with dense verification."""
    model, tokenizer, name = _model(device, smoke)
    count, length = (2, 256) if smoke else (int(os.environ.get("EFFPASS_PROMPTS", "64")), 1024)
    prompts: dict[str, list[Tensor]] = {}
    answers: dict[str, list[Tensor]] = {}
    chances: dict[str, float] = {}
    for task in TASKS:
        examples = [make_example(task, np.random.default_rng((7, length, i)), length, 1, {}) for i in range(count)]
        pairs = [(e.context + e.pairs[0][0], e.pairs[0][1]) for e in examples]
        prompts[task], answers[task] = ([_ids_of(tokenizer, pair[i], device) for pair in pairs] for i in (0, 1))
        chances[task] = examples[0].chance
    width = max(ids.shape[1] for ids in chain(*prompts.values()))
    new = max(ids.shape[1] for ids in chain(*answers.values()))
    batches = {task: _batches(of, width) for task, of in prompts.items()}

    def right(texts: list[Tensor], task: str) -> float:
        each = zip(texts, prompts[task], answers[task], strict=True)
        return float(np.mean([torch.equal(t[:, p.shape[1] :][:, : a.shape[1]], a) for t, p, a in each]))

    with _counting(model):
        for draft in _drafts():
            tree = None if draft == "ngram" else "eagle2"
            dense = _answers(model, draft, tree, batches, new, {})
            for options in _combinations(model, 3):
                thin = _answers(model, draft, tree, batches, new, {**options, "dense_below": 64})
                for task in prompts:
                    shares = [100 * right(found[task][0], task) for found in (thin, dense)]
                    rates = f"{thin[task][1]:.2f} tokens a round, {dense[task][1]:.2f} dense"
                    yield row(
                        AREA, f"{name}, {task}, {length} bytes, {Path(draft).name}, {_told(options)}", "answers right",
                        shares[0], "%", device=device, peer=shares[1], peer_name="dense verification",
                        lower_is_better=False, runs=count,
                        note=f"chance {chances[task]:.1%}; {rates}",
                    )  # fmt: skip


def _ids_of(tokenizer: Any, text: bytes, device: str) -> Tensor:
    return tokenizer(text.decode(), add_special_tokens=False, return_tensors="pt")["input_ids"].to(device)


@contextmanager
def _counting(model: Any) -> Iterator[None]:
    """Nothing is compiled here, and verification is dense afterwards."""
    engine = model.effpass_engine
    compiled, engine.backend = engine.backend, None
    try:
        yield
    finally:
        engine.backend = compiled
        _leave_out(model)


def _answers(
    model: Any, draft: str, tree: str | None, sets: dict[str, list[tuple[Tensor, Tensor]]], new: int,
    options: dict[str, Any],
) -> dict[str, tuple[list[Tensor], float]]:  # fmt: skip
    """Texts `[1, T]` with their prompts, and tokens a round, of each set."""
    _leave_out(model, **options)
    answering = Answering(model, draft, tree, new)
    found = {}
    for of, batches in sets.items():
        texts, (rounds, _, tokens) = answering(batches)
        found[of] = (texts, tokens / rounds)
    return found


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


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    "sparse": sparse,
    "sparse_text": sparse_text,
    "sparse_tasks": sparse_tasks,
}
