"""Area `speculative`, cases `verify`, `attention` and `round`: what things take, with random weights of real shapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import effpass
from benchmarks.backend import _dtype, _free, _weight_bytes
from benchmarks.decode import NO_PASSES, _cache_bytes, _generate, _seconds_a_token
from benchmarks.rows import Row, bandwidth, measure, measure_pair, row, sync
from benchmarks.shapes import head_dim, random_model
from benchmarks.speculative_common import AREA, PROMPT, _captured, _parents, _shape
from effpass.lowering.ops import top_tokens, tree_growth
from effpass.lowering.ops.ancestors import relations
from effpass.lowering.ops.tree_growth import positions_at
from effpass.runtime.attention import reading_cache
from effpass.runtime.speculative import C2T, Classifier, Eagle2, EagleDraft, EagleHead, HeadConfig, Speculator
from effpass.runtime.speculative.growing import Growing
from effpass.runtime.speculative.session import TreeSession


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
                sync(device)
                started = time.perf_counter()
                for _ in range(rounds // 5 or 1):
                    round_.step()
                sync(device)
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


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    "verify": verify,
    "attention": attention,
    "round": round_parts,
}
