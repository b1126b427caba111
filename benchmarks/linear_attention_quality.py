"""What layers of linear attention learn: recall, and the loss of text by position. Cases of area `linear_attention`.

All forms begin from the same seeds, at equal states; the width of the MLPs makes their parameters equal. `attention`
has no bound on what it keeps; `window` is attention over as many tokens as have keys and values, in bfloat16, of a
state's bytes. One learning rate for all, tuned for none.

Recall is MQAR (https://arxiv.org/abs/2312.04927): pairs of key and value, then every key once more among random tokens,
mostly soon; the model says its value. A case is named by pairs, channels of a head and form. A model learns from rows
with an eighth, a quarter, a half and all of the pairs in turn, without which it does not begin to recall in so few
steps.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rows import Row, row
from benchmarks.training_data import CODE, TEXT, Rows, text_rows
from effpass.runtime.linear_attention import GatedDeltaSettings
from effpass.runtime.linear_attention.hybrid import hybrid_config
from effpass.trainers.lm.model import make_model

AREA = "linear_attention"
FORMS = ("gdn", "kda", "fg2", "fg2+", "window", "attention")
SEEDS = (0, 1, 2)
_RATE, _WEIGHT_DECAY = 2e-3, 0.1


class Size(NamedTuple):
    """Of a study's models and batches; a state is heads x channels x channels."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    channels: int
    longest: int
    steps: int
    batch: int


# -- models -----------------------------------------------------------------------------------------------------------


def configs(size: Size) -> dict[str, Any]:
    """A transformers config for each form; none has fewer parameters than another by more than an MLP's channel."""
    plain = {form: _config(form, size, 4 * size.width) for form in FORMS}
    parameters = {form: _parameters(config) for form, config in plain.items()}
    most, each = max(parameters.values()), 3 * size.width * size.layers
    return {
        form: _config(form, size, 4 * size.width + round((most - found) / each)) for form, found in parameters.items()
    }


def _config(form: str, size: Size, inner: int) -> Any:
    from transformers import MistralConfig

    config = MistralConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=inner, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.heads, head_dim=size.channels,
        max_position_embeddings=size.longest, tie_word_embeddings=True,
        # A state has 4 · K · V bytes a head, keys and values of a token 2 · 2 · K.
        sliding_window=size.channels if form == "window" else None,
    )  # fmt: skip
    if form in ("window", "attention"):
        return config
    settings = GatedDeltaSettings(form, size.heads, size.heads, size.channels, size.channels, gate_rank=size.channels)  # type: ignore[arg-type]
    return hybrid_config(config, range(size.layers), settings)


def _parameters(config: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make_model(config, None, 0).parameters())


def train(config: Any, size: Size, seed: int, device: str, batch: Callable[[int], tuple[Tensor, Tensor]]) -> Any:
    """A new model after `size.steps`; `batch` gives ids [B, T] and, for each, what follows it or -100."""
    model = make_model(config, None, seed).to(device).train()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": _WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=_RATE, betas=(0.9, 0.95), fused=device == "cuda")
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _RATE, total_steps=size.steps, pct_start=0.1, div_factor=10, cycle_momentum=False
    )
    for step in range(size.steps):
        loss = _losses(model, *batch(step), device).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def _hidden(model: Any, ids: Tensor, device: str) -> Tensor:
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        hidden: Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def _logits(model: Any, hidden: Tensor, device: str) -> Tensor:
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        found: Tensor = model.lm_head(hidden)
    return found.float()


def _losses(model: Any, ids: Tensor, targets: Tensor, device: str) -> Tensor:
    """Of the graded tokens, in a row."""
    graded = targets.flatten() >= 0
    hidden = _hidden(model, ids, device).flatten(0, 1)[graded]
    return F.cross_entropy(_logits(model, hidden, device), targets.flatten()[graded], reduction="none")


# -- recall -----------------------------------------------------------------------------------------------------------


def recall_batch(size: Size, pairs: int, generator: torch.Generator, rows: int, device: str) -> tuple[Tensor, Tensor]:
    """Ids and targets, int64 [rows, T]. Keys are the lower half of the vocabulary, values the upper."""
    half, length = size.vocabulary // 2, size.longest
    rand = partial(torch.rand, generator=generator, device=device)
    keys = rand(rows, half - 1).topk(pairs).indices + 1
    values = half + (rand(rows, pairs) * (size.vocabulary - half)).long()
    ids = (rand(rows, length) * size.vocabulary).long()
    ids[:, : 2 * pairs] = torch.stack((keys, values), 2).flatten(1)
    # Where keys come again: gaps of a power law, each once (the largest of logits and Gumbel noise).
    gaps = (length - 2 * pairs) // 2
    likely = -0.99 * torch.arange(1, gaps + 1, device=device).log()
    noise = -(-rand(rows, gaps).clamp(min=1e-20).log()).log()
    places = 2 * pairs + 2 * (likely + noise).topk(pairs).indices
    ids.scatter_(1, places, keys)
    return ids, torch.full_like(ids, -100).scatter_(1, places, values)


def _easier(size: Size, pairs: int, times: int, generator: torch.Generator, device: str) -> tuple[Tensor, Tensor]:
    """As many tokens as of `pairs`, in rows with so many times fewer pairs."""
    shorter = size._replace(longest=size.longest // times)
    return recall_batch(shorter, pairs // times, generator, size.batch * times, device)


@torch.no_grad()
def recall_accuracy(model: Any, size: Size, pairs: int, device: str) -> float:
    """Share of values that the model says rightly, of rows that no training saw."""
    ids, targets = recall_batch(size, pairs, torch.Generator(device).manual_seed(10**6), 256, device)
    graded, right = targets >= 0, 0
    for part, wanted, places in zip(ids.split(64), targets.split(64), graded.split(64), strict=True):
        found = _logits(model, _hidden(model, part, device)[places], device).argmax(-1)
        right += int((found == wanted[places]).sum())
    return right / int(graded.sum())


def recall(pairs: int, channels: int, form: str, device: str, smoke: bool) -> Iterator[Row]:
    """Accuracy over the seeds."""
    size = Size(512, 128, 2, 2, channels, 8 * pairs, 2000, 64)
    if smoke or device != "cuda":
        pairs, size = 8, Size(32, 16, 2, 1, 16, 64, 3, 4)
    config, started, found = configs(size)[form], time.perf_counter(), []
    for seed in SEEDS:
        generator = torch.Generator(device).manual_seed(seed)
        model = train(
            config, size, seed, device,
            lambda step, generator=generator: _easier(size, pairs, 1 << 3 - step % 4, generator, device),  # type: ignore[misc]
        )  # fmt: skip
        found.append(recall_accuracy(model, size, pairs, device))
    case = f"{form}, {pairs} pairs in {size.longest} tokens, heads of {size.channels}"
    yield row(AREA, case, "recall", 100 * statistics.fmean(found), "%", device=device, lower_is_better=False,
              runs=len(found), note=_note(found, 100, config, size, started))  # fmt: skip


def _note(found: list[float], times: float, config: Any, size: Size, started: float) -> str:
    each = ", ".join(f"{times * x:.4g}" for x in found)
    return (
        f"seeds {each}; {_parameters(config)} parameters, {size.steps} steps of {size.batch} rows, "
        f"{time.perf_counter() - started:.0f} s"
    )


# -- text -------------------------------------------------------------------------------------------------------------


def pretraining(form: str, device: str, smoke: bool) -> Iterator[Row]:
    """Loss of held-out text, in bits a byte, by position to 16384, after training on rows of 2048."""
    size, read = Size(264, 256, 6, 4, 64, 2048, 400, 16), 16384
    if smoke or device != "cuda":
        size, read = Size(264, 16, 2, 1, 16, 32, 2, 2), 128
    patterns = TEXT if os.environ.get("EFFPASS_DATA") else CODE
    config = configs(size)[form]
    held_out = text_rows(patterns, 1, 1, read, 0).held_out["text"][0][: 2 if smoke or device != "cuda" else 16]
    started, found = time.perf_counter(), []
    for seed in SEEDS:
        model = train(config, size, seed, device, partial(_text, _rows(patterns, size, seed), device))
        found.append(_bits(model, held_out, device))
    kind = "text and code" if patterns is TEXT else "code"
    for first, last in _spans(read):
        of_seeds = [float(x[first:last].mean()) for x in found]
        yield row(AREA, f"{form}, {kind}", f"loss of tokens {first} to {last}", statistics.fmean(of_seeds), "bits",
                  device=device, runs=len(SEEDS), note=_note(of_seeds, 1, config, size, started))  # fmt: skip


def _rows(patterns: tuple[str, ...], size: Size, seed: int) -> Rows:
    return text_rows(patterns, size.steps, size.batch, size.longest, seed)


def _text(rows: Rows, device: str, step: int) -> tuple[Tensor, Tensor]:
    ids = rows.batch(step, device)[0].long()
    return ids, F.pad(ids[:, 1:], (0, 1), value=-100)


@torch.no_grad()
def _bits(model: Any, ids: Tensor, device: str) -> Tensor:
    """Bits a byte of each position but the first, mean over rows, on the CPU."""
    total = torch.zeros(ids.shape[1] - 1, device=device)
    for line in ids.long().to(device).split(1):
        total += _losses(model, line, F.pad(line[:, 1:], (0, 1), value=-100), device)
    return (total / len(ids) / torch.log(torch.tensor(2.0))).cpu()


def _spans(length: int) -> Iterator[tuple[int, int]]:
    """Eight spans, each twice as long as the one before but for the first."""
    edges = [0, *(length >> level for level in range(7, -1, -1))]
    yield from itertools.pairwise(edges)


LOADS = ((16, 16), (32, 16), (64, 16), (32, 32), (64, 32), (128, 32))

CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    **{f"recall-{n}x{channels}-{form}": partial(recall, n, channels, form) for n, channels in LOADS for form in FORMS},
    **{f"pretraining-{form}": partial(pretraining, form) for form in FORMS},
}
