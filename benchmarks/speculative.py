"""Area `speculative`: what rounds of speculative decoding take, and what they give on five sets of prompts.

The base is our own greedy decoding, whose steps are one CUDA graph as rounds are. Models of real shapes with random
weights say what things take; what is accepted is measured on the trained model that `--model` names, with the drafts in
EFFPASS_DRAFT (folders with commas, or ngram).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import effpass
from benchmarks.backend import _dtype, _free, _weight_bytes
from benchmarks.decode import NO_PASSES, _cache_bytes, _generate, _seconds_a_token
from benchmarks.rows import Row, _sync, bandwidth, measure, measure_pair, row
from benchmarks.shapes import head_dim, random_model
from benchmarks.speculative_data import SETS, test_prompts
from effpass.lowering.ops import top_tokens, tree_growth
from effpass.lowering.ops.ancestors import relations
from effpass.lowering.ops.tree_growth import positions_at
from effpass.runtime.attention import reading_cache
from effpass.runtime.cuda_graph import record
from effpass.runtime.speculative import C2T, Classifier, Eagle2, EagleDraft, EagleHead, HeadConfig, Speculator
from effpass.runtime.speculative.generation import generate
from effpass.runtime.speculative.growing import Growing
from effpass.runtime.speculative.open_draft import open_draft
from effpass.runtime.speculative.session import TreeSession

AREA = "speculative"
PROMPT = 512


def _shape(device: str, smoke: bool) -> str:
    return "tiny" if smoke or device == "cpu" else os.environ.get("EFFPASS_SHAPES", "llama-3.1-8b")


def _captured(work: Callable[[], Any], device: str) -> Callable[[], Any]:
    """`work` as a CUDA graph; as it is on a CPU."""

    def warm_up() -> None:
        for _ in range(2):
            work()

    return work if device != "cuda" else record(work, warm_up=warm_up).replay


def _parents(nodes: int, depth: int, device: str) -> Tensor:
    """A tree with a few deep paths and many short ones, int64 `[1, N]`."""
    parents, level = [-1], [0]
    rng = np.random.default_rng(nodes)
    while len(parents) < nodes:
        parent = int(rng.integers(len(parents)))
        if level[parent] < depth:
            parents.append(parent)
            level.append(level[parent] + 1)
    return torch.tensor([parents], device=device)


# -- what things take --------------------------------------------------------------------------------------------------


def verify(device: str, smoke: bool) -> Iterator[Row]:
    """One call of the model on trees of 1 to 128 nodes, against as many plain steps."""
    shape = _shape(device, smoke)
    sizes = (1, 4, 9) if smoke else (1, 4, 8, 16, 24, 32, 48, 64, 96, 128)
    model = effpass.prepare(random_model(shape, device, _dtype(device)), NO_PASSES)
    ids = torch.randint(5, model.config.vocab_size, (1, PROMPT), device=device)
    short, long, runs = (4, 12, 1) if smoke else (32, 160, 3)
    plain = _generate(model, ids)
    plain(long)
    step = _seconds_a_token(plain, short, long, runs, device)
    model.effpass_engine.release()
    bound = (_weight_bytes(model) + _cache_bytes(model, PROMPT)) / bandwidth(device)
    for nodes in sizes:
        seconds = _verify(model, ids, nodes, device, smoke)
        yield row(
            AREA, f"{shape}, {_dtype(device)}, batch 1, prefix {PROMPT}".replace("torch.", ""),
            f"verify {nodes} nodes", seconds * 1e3, "ms", device=device, peer=nodes * step * 1e3,
            peer_name="as many plain steps", bound=bound * 1e3, runs=15, note=f"{seconds / step:.2f} plain steps",
        )  # fmt: skip
        _free(device)


def _verify(model: Any, ids: Tensor, nodes: int, device: str, smoke: bool) -> float:
    backend = model.effpass_engine.backend
    session = TreeSession(model, 1, PROMPT + 256, nodes, backend)
    parents = _parents(nodes, 8, device)
    depths, ancestors = relations(parents, 8)
    positions = positions_at(torch.tensor([PROMPT], dtype=torch.int32, device=device), depths)
    tokens = torch.randint(5, model.config.vocab_size, (1, nodes), device=device)
    with torch.no_grad(), reading_cache(model):
        session.begin(1)
        session.prefill(ids, None, 1 << 15)
        session.cache.begin_tree()
        with session.recording():
            call = _captured(lambda: session.run(tokens, positions, ancestors), device)
        return measure(call, device, warmup=3, runs=3 if smoke else 15, inner=1 if device == "cpu" else 20).median


def attention(device: str, smoke: bool) -> Iterator[Row]:
    """Tree attention of one layer of the 8B shape, against SDPA with a mask, several layers' caches in turn."""
    heads, groups, size = (4, 2, 32) if smoke or device == "cpu" else (32, 8, 128)
    dtype, layers = _dtype(device), 1 if device == "cpu" else 8
    for prefix in (256,) if smoke or device == "cpu" else (1024, 8192, 32768):
        for nodes in (9,) if smoke else (1, 16, 64):
            parents = _parents(nodes, 8, device)
            depths, ancestors = relations(parents, 8)
            root = torch.tensor([prefix], dtype=torch.int32, device=device)
            positions = positions_at(root, depths)
            slots = torch.cat((torch.arange(prefix, dtype=torch.int32, device=device)[None], positions), 1)
            q = torch.randn(layers, 1, heads, nodes, size, device=device, dtype=dtype)
            k, v = (torch.randn(layers, 1, groups, prefix + nodes, size, device=device, dtype=dtype) for _ in range(2))
            bits = (ancestors[..., 0, None] >> torch.arange(nodes, device=device)) & 1 == 1
            seen = torch.ones(1, nodes, prefix, dtype=torch.bool, device=device)
            mask = torch.cat((seen, bits), 2)[:, None]

            def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v, given: Any = (slots, positions, root, ancestors),
                     prefix: int = prefix) -> None:  # fmt: skip
                for layer in range(len(q)):
                    torch.ops.effpass.tree_attention(q[layer], k[layer], v[layer], *given, prefix, size**-0.5, 0, 0.0)

            def sdpa(q: Tensor = q, k: Tensor = k, v: Tensor = v, mask: Tensor = mask) -> None:
                for layer in range(len(q)):
                    torch.nn.functional.scaled_dot_product_attention(
                        q[layer], k[layer], v[layer], attn_mask=mask, enable_gqa=True
                    )

            times = measure_pair(
                _captured(ours, device),
                _captured(sdpa, device),
                device,
                runs=3 if smoke else 15,
                inner=2 if smoke else 10,
            )
            moved = 2 * groups * (prefix + nodes) * size * q.element_size()
            yield row(
                AREA, f"GQA {heads}/{groups} x {size}, prefix {prefix}, {nodes} nodes, {dtype}".replace("torch.", ""),
                "tree attention of a layer", times[0].median / layers * 1e6, "us", device=device,
                peer=times[1].median / layers * 1e6, peer_name="SDPA with a mask, enable_gqa",
                bound=moved / bandwidth(device) * 1e6, runs=15,
            )  # fmt: skip
            del q, k, v
            _free(device)


def round_parts(device: str, smoke: bool) -> Iterator[Row]:
    """A round with an EAGLE-3 head on the 8B shape, and the part of it in which trees are built."""
    shape = _shape(device, smoke)
    small = shape == "tiny"
    model = effpass.prepare(random_model(shape, device, _dtype(device)), NO_PASSES)
    vocabulary = 60 if small else min(32000, model.config.vocab_size)
    torch.manual_seed(0)
    classifier = Classifier()
    kinds = {
        "eagle2, top_k 10, depth 6, 60 nodes": Eagle2(3, 3, 12) if small else Eagle2(10, 6, 60),
        "c2t, top_k 15, depth 10, 64 nodes": C2T(classifier, 0.0, 3, 3, 12)
        if small
        else C2T(classifier, 0.0, 15, 10, 64),
    }
    for name, kind in kinds.items():
        head = _random_head(model, vocabulary, device)
        speculator = Speculator(
            model.effpass_engine, EagleDraft(head, kind, model.effpass_engine.backend), switches=False
        )
        seconds = _round(model, speculator, device, smoke)
        grow = _growth(kind, vocabulary, device, smoke)
        case = f"{shape}, head with {vocabulary} tokens, {name}, {_dtype(device)}".replace("torch.", "")
        yield row(AREA, case, "a round", seconds * 1e3, "ms", device=device, runs=15)
        yield row(
            AREA, case, "building a tree", grow[0] * 1e6, "us", device=device, peer=grow[1] * 1e6,
            peer_name="the same by PyTorch's operators, captured too", runs=15,
            note=f"{grow[0] / seconds:.1%} of the round",
        )  # fmt: skip
        del head, speculator
        _free(device)


def _random_head(model: Any, vocabulary: int, device: str) -> EagleHead:
    from transformers import LlamaConfig

    config = model.config
    layer = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads,
        head_dim=head_dim(config), num_hidden_layers=1, max_position_embeddings=config.max_position_embeddings,
    )  # fmt: skip
    layers = config.num_hidden_layers
    taps = (2, layers // 2, layers - 3) if layers > 5 else (0, layers - 1)
    with torch.device(device):
        head = EagleHead(HeadConfig(layer, vocabulary, taps))
    if head.d2t is not None:
        head.choose_tokens(torch.arange(vocabulary, device=device))
    head.share(model)
    return head.to(_dtype(device)).eval().requires_grad_(False)


def _round(model: Any, speculator: Speculator, device: str, smoke: bool) -> float:
    """Seconds of a round; replays go on from one another, which is what they do in use."""
    ids = torch.randint(5, model.config.vocab_size, (1, 64 if smoke else PROMPT), device=device)
    rounds = 3 if smoke else 100
    found: list[float] = []

    def loop(model: Any, input_ids: Tensor, **prepared: Any) -> Tensor:
        limit = input_ids.shape[1] + (rounds + 8) * (speculator.draft.kind.depth + 1)
        with torch.inference_mode(False), torch.no_grad(), speculator.round(1, limit) as (round_, _):
            round_.target.prefill(input_ids, None, 1 << 15)
            round_.drafting.begin(input_ids, None, 1 << 15)
            criteria, processors = prepared["stopping_criteria"], prepared["logits_processor"]
            round_.begin(input_ids, processors, criteria, prepared["generation_config"], limit)
            for _ in range(4):
                round_.step()
            for _ in range(1 if smoke else 5):
                _sync(device)
                started = time.perf_counter()
                for _ in range(rounds // 5 or 1):
                    round_.step()
                _sync(device)
                found.append((time.perf_counter() - started) / (rounds // 5 or 1))
        return input_ids

    type(model).generate(
        model, input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0, custom_generate=loop
    )
    return sorted(found)[len(found) // 2]


class _Known:
    """A draft whose logits are there already."""

    names = None

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def step(self, *_: Any) -> Tensor:
        return self.logits


class _Operators:
    """The references, under the operators' names."""

    top_tokens = staticmethod(top_tokens._top_tokens)
    grow_layer = staticmethod(tree_growth._grow_layer)
    best_nodes = staticmethod(tree_growth._best_nodes)


def _growth(kind: Any, vocabulary: int, device: str, smoke: bool) -> tuple[float, float]:
    """Seconds of building a tree from a draft's logits, ours and by PyTorch's operators."""
    logits = torch.randn(1, kind.top_k, vocabulary, device=device).mul_(3).to(_dtype(device))
    root = torch.zeros(1, dtype=torch.long, device=device)
    position = torch.zeros(1, dtype=torch.int32, device=device)
    calls = []
    for operators in (torch.ops.effpass, _Operators):
        grower: Growing = kind.grower(1, torch.device(device))
        grower.operators = operators
        calls.append(
            _captured(lambda g=grower: g.grow(_Known(logits), root, position, logits[:, 0], None), device)  # type: ignore[misc]
        )
    with torch.no_grad():
        times = measure_pair(*calls, device, runs=3 if smoke else 15, inner=1 if device == "cpu" else 20)
    return times[0].median, times[1].median


# -- what they give ----------------------------------------------------------------------------------------------------


@cache
def _model(device: str, smoke: bool) -> tuple[Any, Any, str]:
    """A prepared model, its tokenizer, and its name."""
    name = os.environ.get("EFFPASS_MODEL", "smollm2")
    loaded = effpass.load_model(name, dtype=_dtype(device))
    model = loaded.model.to(device)
    return effpass.prepare(model, NO_PASSES), loaded.tokenizer, Path(name).name


def _drafts() -> list[str]:
    return os.environ.get("EFFPASS_DRAFT", "ngram").split(",")


def _sets(smoke: bool) -> Sequence[str]:
    chosen = os.environ.get("EFFPASS_SETS")
    return chosen.split(",") if chosen else SETS[:1] if smoke else SETS


def _ids(tokenizer: Any, text: str, device: str) -> Tensor:
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)["input_ids"]
    return ids[:, -1536:].to(device)


def _rate(run: Callable[[Tensor], Any], prompts: Sequence[Tensor], new: int, device: str) -> float:
    """Tokens a second over `prompts`, prompts included in the time."""
    seconds = 0.0
    for ids in prompts:
        _sync(device)
        started = time.perf_counter()
        run(ids)
        _sync(device)
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
    "verify": verify,
    "attention": attention,
    "round": round_parts,
    "text": text,
    "c2t": c2t,
}
