"""Area `quality`: what a model gets right with all of its cache, and with deliberately bad selections of it.

The bad selections say whether a row can tell methods apart. *A random tenth* of the keys and values is a floor. *Blocks
only* keeps as many: blocks of 64, or two smaller ones, whose mean key matches the question best, one choice a layer.
Where neither loses 10 points, or the model itself is near chance, the row is marked *no signal*. Captions and questions
about pictures stand in `benchmarks.quality_pictures`.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface

from benchmarks.rows import Row, row
from effpass.runtime.attention import cached_attention, reading_cache
from effpass.runtime.cache import DecodeCache
from effpass.trainers.lm.model import auto_class, reads_pictures
from effpass.trainers.lm.tasks import TASKS, Example, make_example, shortest

AREA = "quality"
MODELS = Path(__file__).parents[1] / "models"
SEEDS = (0, 1, 2)
BUDGET = 0.1
BLOCK = 64
_BLOCKS_ONLY = "effpass_blocks_only"
# A row counts where the model reaches this share of right answers, and so many times chance, and a bad selection loses
# so much.
_LEAST, _TIMES_CHANCE, _LOSS = 0.2, 5, 0.1
# Logits that are computed of a call's last tokens: a question with its answer, a caption.
_TAIL = 256


# -- models --------------------------------------------------------------------------------------------------------


def _names(smoke: bool) -> list[str]:
    given = os.environ.get("EFFPASS_MODEL")
    if given:
        return given.split(",")
    found = [path.parent.name for path in sorted(MODELS.glob("*/model.safetensors"))]
    if not found and not smoke:
        raise SystemExit(f"quality: no trained model in {MODELS}; give one with --model NAME_OR_FOLDER")
    return [] if smoke else found


@cache
def _load(name: str, device: str) -> tuple[Any, Any, str]:
    """Model, tokenizer, and what rows call it: its name with the hash of its weights."""
    from transformers import AutoConfig, AutoTokenizer

    folder = MODELS / name if (MODELS / name / "config.json").exists() else Path(name)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise SystemExit(f"quality: {folder} holds no model.safetensors")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()[:12]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=dtype)
    model = model.to(device).eval()
    return model, AutoTokenizer.from_pretrained(folder), f"{folder.name} sha256:{digest}"


def _tiny(device: str) -> tuple[Any, Any, str]:
    """A random model for smoke runs."""
    from effpass.trainers.lm.model import make_model, model_config
    from effpass.trainers.lm.tokenizer import byte_tokenizer

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
    tokenizer = byte_tokenizer()
    config = model_config({"model_type": "llama", **shape}, tokenizer, 512)
    return make_model(config, None, 0).to(device).eval(), tokenizer, "random"


def _models(device: str, smoke: bool) -> Iterator[tuple[Any, Any, str]]:
    for name in _names(smoke):
        yield _load(name, device)
    if not _names(smoke):
        yield _tiny(device)


# -- text ----------------------------------------------------------------------------------------------------------


def perplexity(device: str, smoke: bool) -> Iterator[Row]:
    """Perplexity of a token by its position in the context, on WikiText-2's validation text."""
    place = os.environ.get("EFFPASS_DATA")
    if place is None:
        raise SystemExit("quality: set EFFPASS_DATA (or --data) to the folder that holds wikitext-2/valid.txt")
    text = (Path(place) / "wikitext-2" / "valid.txt").read_text(encoding="utf-8")
    for model, tokenizer, name in _models(device, smoke):
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        length = min(_longest(model), len(ids))
        rows = ids[: len(ids) // length * length].view(-1, length)[: 2 if smoke else 32]
        losses = torch.stack([_losses(model, part.to(device)) for part in rows])
        edges = [0, *(4**k for k in range(4, 8) if 4**k < length), length]
        for first, last in pairwise(edges):
            part = losses[:, max(0, first - 1) : last - 1].double()
            error = part.mean(1).std().item() / math.sqrt(len(part)) if len(part) > 1 else math.nan
            yield row(
                AREA, f"{name}, WikiText-2 validation", f"perplexity, positions {first} to {last}",
                part.mean().exp().item(), "", device=device, runs=len(part),
                note=f"log-perplexity {part.mean().item():.4f}, standard error {error:.4f} over {len(part)} sequences",
            )  # fmt: skip


def _longest(model: Any) -> int:
    """Tokens of the longest context that a row is about."""
    return min(model.config.get_text_config(decoder=True).max_position_embeddings, 32768)


@torch.no_grad()
def _losses(model: Any, ids: Tensor) -> Tensor:
    """Nats of each token but the first: float32 `[T - 1]` of ids `[T]`."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return cross_entropy(logits.float(), ids[1:], reduction="none").cpu()


# -- tasks ---------------------------------------------------------------------------------------------------------


def tasks(device: str, smoke: bool) -> Iterator[Row]:
    """Each task's share of right answers, dense and with bad selections; of models that read text alone."""
    for model, tokenizer, name in _models(device, smoke):
        if reads_pictures(model.config):
            continue
        longest = _longest(model)
        for length in sorted({min(1024, longest), longest}):
            for task in TASKS:
                if length >= shortest(task, {}):
                    yield from _task(model, tokenizer, name, task, length, device, smoke)


def _task(model: Any, tokenizer: Any, name: str, task: str, length: int, device: str, smoke: bool) -> Iterator[Row]:
    count = 2 if smoke else 64
    found: dict[str, list[float]] = {kind: [] for kind in SELECTIONS}
    chance = 0.0
    for seed in SEEDS:
        rngs = [np.random.default_rng((seed, length, i)) for i in range(count)]
        examples = [make_example(task, rng, length, 1, {}) for rng in rngs]
        chance = examples[0].chance
        for kind in SELECTIONS:
            found[kind].append(_accuracy(model, tokenizer, examples, kind, seed))
    yield from answer_rows(f"{name}, {task}, {length} bytes", found, chance, count, device)


def answer_rows(case: str, found: dict[str, list[float]], chance: float, count: int, device: str) -> Iterator[Row]:
    """Rows of the shares of right answers.

    Args:
        found: selection → share for each seed of prompts.
        chance: share of right guesses.
        count: prompts of a seed.
    """
    mean = {kind: float(np.mean(values)) for kind, values in found.items()}
    dense = mean.pop("all keys")
    is_clear = dense >= max(_LEAST, _TIMES_CHANCE * chance) and min(mean.values()) <= dense - _LOSS
    signal = "" if is_clear else "; no signal"
    spread = {kind: f"{min(v):.1%} to {max(v):.1%} over {len(SEEDS)} seeds of prompts" for kind, v in found.items()}
    yield row(
        AREA, case, "answers right, all keys", 100 * dense, "%", device=device, runs=count * len(SEEDS),
        note=f"chance {chance:.1%}; {spread['all keys']}{signal}",
    )  # fmt: skip
    for kind, value in mean.items():
        yield row(
            AREA, case, f"answers right, {kind}", 100 * value, "%", device=device, peer=100 * dense,
            peer_name="all keys", lower_is_better=False, runs=count * len(SEEDS),
            note=f"chance {chance:.1%}; {spread[kind]}{signal}",
        )  # fmt: skip


SELECTIONS = ("all keys", f"a random {BUDGET:.0%} of the keys", f"blocks only, {BUDGET:.0%} of the keys")


def _accuracy(model: Any, tokenizer: Any, examples: list[Example], kind: str, seed: int) -> float:
    """The share of answers that greedy decoding would give, every token of them, after a selection of the context."""
    generator = torch.Generator(model.device).manual_seed(seed)
    right = []
    for context, question, answer in _batches(model, tokenizer, examples):
        logits = logits_after(model, context, torch.cat([question, answer[:, :-1]], 1), kind, generator)
        chosen = logits[:, -answer.shape[1] :].argmax(-1)
        right += (chosen == answer).all(1).tolist()
    return float(np.mean(right))


@torch.no_grad()
def logits_after(
    model: Any, context: Tensor, tail: Tensor, kind: str, generator: torch.Generator, **pictures: Tensor
) -> Tensor:
    """Logits of the last tokens of `tail` `[B, t]`, up to 256, with the keys that `kind` selects of `context` `[B, T]`.

    Args:
        kind: of the selections.
        generator: of the random one.
        pictures: `pixel_values`, where the context has any.
    """
    rows, tokens = context.shape
    cache = DecodeCache(model.config, rows, tokens + tail.shape[1], model.device)
    with reading_cache(model):
        if kind == SELECTIONS[2]:
            AttentionInterface.register(_BLOCKS_ONLY, _blocks_only)
            model.set_attn_implementation(
                {"text_config": _BLOCKS_ONLY} if reads_pictures(model.config) else _BLOCKS_ONLY
            )
        _call(model, cache, context, 0, **pictures)
        if kind == SELECTIONS[1]:
            drawn = torch.rand(rows, tokens, generator=generator, device=model.device)
            dropped = drawn.argsort(1)[:, max(1, round(BUDGET * tokens)) :]
            cache.slots.positions.scatter_(1, dropped, -1)
            cache.slots.is_dense = False
        return _call(model, cache, tail, tokens)


def _batches(model: Any, tokenizer: Any, examples: list[Example]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Ids `[B, T]` of contexts, questions and answers; examples of equal lengths together."""
    ids = [
        tuple(tokenizer(part.decode(), add_special_tokens=False)["input_ids"] for part in (e.context, *e.pairs[0]))
        for e in examples
    ]
    most = max(1, (1 << 18) // len(ids[0][0])) if model.device.type == "cuda" else 4
    while ids:
        lengths = [len(part) for part in ids[0]]
        group = [e for e in ids if [len(part) for part in e] == lengths][:most]
        ids = [e for e in ids if not any(e is other for other in group)]
        context, question, answer = (torch.tensor([e[i] for e in group], device=model.device) for i in range(3))
        yield context, question, answer


def _call(model: Any, cache: DecodeCache, ids: Tensor, start: int, **pictures: Tensor) -> Tensor:
    """Logits of tokens that follow `start` others; of the last 256 alone."""
    rows, tokens = ids.shape
    positions = torch.arange(start, start + tokens, dtype=torch.int32, device=ids.device).expand(rows, -1).contiguous()
    cache.append(positions)
    cache.advance(tokens)
    return model(
        input_ids=ids, position_ids=positions.long(), past_key_values=cache, effpass_cache=cache, use_cache=True,
        logits_to_keep=min(_TAIL, tokens), **pictures,
    ).logits  # fmt: skip


def _blocks_only(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    effpass_cache: DecodeCache, scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention over the context's best blocks and what follows the context."""
    tokens, reads = query.shape[2], key.shape[2]
    if tokens == reads:
        return cached_attention(
            module, query, key, value, attention_mask, effpass_cache=effpass_cache, scaling=scaling, **kwargs
        )
    layer = effpass_cache.buffers(module.layer_idx)
    context = reads - tokens
    size = BLOCK if BUDGET * context >= BLOCK else max(1, round(BUDGET * context / 2))  # else two smaller blocks
    blocks = context // size
    means = key[:, :, : blocks * size].unflatten(2, (blocks, size)).mean(3)  # [B, G, blocks, K]
    means = means.repeat_interleave(query.shape[1] // means.shape[1], 1)
    scores = (query.float() @ means.float().mT).softmax(-1).sum((1, 2))  # [B, blocks], over heads and tokens
    kept = scores.topk(max(1, round(BUDGET * context / size)), dim=1).indices
    is_kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, kept, True).repeat_interleave(size, 1)
    positions = layer.slots.positions[:, :reads].clone()
    positions[:, :context] = -1
    positions[:, : blocks * size] = layer.slots.positions[:, : blocks * size].where(is_kept, -1)
    out = torch.ops.effpass.cached_attention(
        query, key, value, positions, effpass_cache.query_positions, layer.slots.filled,
        scaling or query.shape[-1] ** -0.5, layer.window, 0.0,
    )  # fmt: skip
    return out, None


def pictures(device: str, smoke: bool) -> Iterator[Row]:
    """Captions and questions about pictures, of models that read them."""
    from benchmarks.quality_pictures import caption_rows, question_rows, tiny

    models = [tiny(device)] if smoke else _models(device, smoke)
    for model, _, name in models:
        if reads_pictures(model.config):
            yield from caption_rows(model, name, device, smoke)
            yield from question_rows(model, name, device, smoke)


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    "perplexity": perplexity,
    "tasks": tasks,
    "pictures": pictures,
}
