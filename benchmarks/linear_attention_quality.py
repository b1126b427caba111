"""What layers of linear attention learn: recall, and the loss of text by position. Cases of area `linear_attention`.

All forms begin from the same seeds, at equal states, and read the same rows; the width of the MLPs makes their
parameters equal. `attention` has no bound on what it keeps; `window` is attention over as many tokens as have keys and
values, in bfloat16, of a state's bytes. Both have the short convolution of the linear layers, and like them no position
embedding, so that the forms differ in what they keep alone. One learning rate for all, tuned for none. A case trains
the forms one after another, all of them or those that EFFPASS_FORMS names, with commas; a note lists the seeds' own
values and their spread, the largest minus the smallest.

Recall is MQAR (https://arxiv.org/abs/2312.04927): pairs of key and value, then every key once more in another order,
for which the model says the value. A case is named by pairs and channels of a head. A model learns from rows with an
eighth, a quarter, a half and all of the pairs in turn.

Pretraining is on what models/tiny-long reads: text, code, and tasks whose answers alone are graded.

On a GPU, a step is one CUDA graph: these models are so small that it would otherwise wait for its launches.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from benchmarks.quality import MODELS
from benchmarks.rows import Row, row
from benchmarks.training_data import _corpus
from effpass.runtime.cuda_graph import record
from effpass.runtime.linear_attention import GatedDeltaSettings
from effpass.runtime.linear_attention.hybrid import hybrid_config, is_hybrid
from effpass.trainers.lm.batches import MicroBatches
from effpass.trainers.lm.config import Config, Schedule, Stage, load_config
from effpass.trainers.lm.corpus import Corpus
from effpass.trainers.lm.model import make_model
from effpass.trainers.lm.tasks import make_example
from effpass.trainers.lm.tokenizer import byte_ids
from effpass.trainers.loop import make_loader

AREA = "linear_attention"
FORMS = ("gdn", "kda", "fg2", "fg2+", "window", "attention")
SEEDS = (0, 1, 2)
_WEIGHT_DECAY = 0.1
_CONV = 4  # tokens of the short convolution
_LEVELS = 4  # shapes of batches, in turn

Batch = Callable[[int, int], tuple[Tensor, Tensor]]


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
    rate: float = 3e-3


# -- models -----------------------------------------------------------------------------------------------------------


def configs(size: Size) -> dict[str, Any]:
    """A transformers config for each form; none has fewer parameters than another by more than an MLP's channel."""
    plain = {form: _config(form, size, 4 * size.width) for form in FORMS}
    parameters = {form: _parameters(config) for form, config in plain.items()}
    most, each = max(parameters.values()), 3 * size.width * size.layers
    return {
        form: _config(form, size, 4 * size.width + round((most - found) / each)) for form, found in parameters.items()
    }


def _chosen(size: Size) -> list[tuple[str, Any]]:
    """Forms to train, and their configs."""
    wanted = os.environ.get("EFFPASS_FORMS", ",".join(FORMS)).split(",")
    if unknown := set(wanted) - set(FORMS):
        raise SystemExit(f"linear_attention: EFFPASS_FORMS: {min(unknown)!r} is none of {', '.join(FORMS)}")
    return [(form, config) for form, config in configs(size).items() if form in wanted]


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


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention, over a window if the config has one.

    transformers makes no mask for an attention that it does not know. For its own it first looks for packed rows, which
    waits for the device, or, where a graph is captured, makes a mask of every attention.
    """
    mask, window = None, module.config.sliding_window
    if window is not None:
        place = torch.arange(query.shape[2], device=query.device)
        mask = (place[:, None] >= place) & (place[:, None] < place + window)
    out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("benchmark", _attention)


class _Convolved(nn.Module):
    """A projection of attention with what linear layers have behind theirs: a short convolution, and SiLU."""

    def __init__(self, projection: Any) -> None:
        super().__init__()
        channels = projection.out_features
        self.projection = projection
        self.conv = nn.Conv1d(channels, channels, _CONV, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projected = self.projection(x)
        full, taps = F.pad(projected, (0, 0, _CONV - 1, 0)), self.conv.weight[:, 0].to(projected.dtype)
        out = full[:, : x.shape[1]] * taps[:, 0]
        for place in range(1, _CONV):
            out = out + full[:, place : place + x.shape[1]] * taps[:, place]
        return F.silu(out)


def new_model(config: Any, seed: int) -> Any:
    model: Any = make_model(config, None, seed)
    model.set_attn_implementation("benchmark")
    if not is_hybrid(config):
        model.model.rotary_emb.inv_freq.zero_()  # every token at position 0
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(layer.self_attn, name, _Convolved(getattr(layer.self_attn, name)))
    return model


def _parameters(config: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in new_model(config, 0).parameters())


class Learner:
    """A model of a form and its optimizer, for runs one after another; `batch` of a run gives, for a seed and a step,
    ids [B, T] and what follows each or -100."""

    def __init__(self, config: Any, size: Size, device: str) -> None:
        self.config, self.size, self.device = config, size, device
        self.model = new_model(config, 0).to(device)
        self.rate = torch.tensor(size.rate, device=device)
        groups = [
            {"params": [p for p in self.model.parameters() if p.dim() >= 2], "weight_decay": _WEIGHT_DECAY},
            {"params": [p for p in self.model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.rate, betas=(0.9, 0.95), fused=True, capturable=device == "cuda"
        )
        self._steps: dict[torch.Size, Callable[[Tensor, Tensor], None]] = {}

    def train(self, seed: int, batch: Batch, shapes: Iterable[int] = range(_LEVELS)) -> Any:
        """The model after `size.steps` from new weights, in evaluation mode; the next run overwrites it. Batches of all
        shapes that occur are among those of the steps `shapes`."""
        self.model.train()
        for step in shapes:  # before the weights are set
            ids, targets = batch(seed, step)
            if ids.shape not in self._steps:
                self._steps[ids.shape] = self._made(ids, targets)
        self.model.load_state_dict(new_model(self.config, seed).state_dict())
        for state in self.optimizer.state.values():
            for x in state.values():
                x.zero_()
        for step in range(self.size.steps):
            ids, targets = batch(seed, step)
            self.rate.fill_(self.size.rate * _factor(step, self.size.steps))
            self._steps[ids.shape](ids, targets)
        return self.model.eval()

    def _step(self, ids: Tensor, targets: Tensor) -> None:
        """The loss is a mean over rows, of each row's over what it grades. Nothing here waits for the device."""
        self.optimizer.zero_grad()
        losses = _losses(self.model, ids, targets, self.device).view_as(targets)
        (losses.sum(1) / (targets >= 0).sum(1)).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def _made(self, ids: Tensor, targets: Tensor) -> Callable[[Tensor, Tensor], None]:
        """The step for this shape: on a GPU a graph, which reads its batch from tensors of its own."""
        if self.device != "cuda":
            return self._step
        own_ids, own_targets = ids.clone(), targets.clone()

        def warm_up() -> None:
            for _ in range(3):  # compiles kernels, and makes the optimizer's state
                self._step(own_ids, own_targets)
            self.optimizer.zero_grad()

        try:
            graph = record(lambda: self._step(own_ids, own_targets), warm_up=warm_up)
        except Exception as error:
            print(f"the step is not captured, and runs eagerly: {type(error).__name__}: {str(error)[:300]}", flush=True)
            torch.cuda.synchronize()
            return self._step

        def replayed(ids: Tensor, targets: Tensor) -> None:
            own_ids.copy_(ids)
            own_targets.copy_(targets)
            graph.replay()

        return replayed


def _factor(step: int, steps: int) -> float:
    """Of the rate: a linear rise over a tenth of the steps, then half a cosine."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def _logits(model: Any, ids: Tensor, device: str, last: int = 0) -> Tensor:
    """Float32, of all tokens or of the `last`."""
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        found: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=last).logits
    return found.float()


def _losses(model: Any, ids: Tensor, targets: Tensor, device: str) -> Tensor:
    """Of all tokens, in a row; 0 where nothing is graded."""
    return F.cross_entropy(_logits(model, ids, device).flatten(0, 1), targets.flatten(), reduction="none")


# -- recall -----------------------------------------------------------------------------------------------------------


def recall_batch(vocabulary: int, pairs: int, rows: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Ids and targets, int64 [rows, 3 · pairs]. Keys are the lower half of the vocabulary, values the upper."""
    half = vocabulary // 2
    rand = partial(torch.rand, generator=torch.Generator(device).manual_seed(seed), device=device)
    keys = rand(rows, half).topk(pairs).indices
    values = half + (rand(rows, pairs) * half).long()
    order = rand(rows, pairs).argsort(1)
    told = torch.stack((keys, values), 2).flatten(1)
    ids = torch.cat((told, keys.gather(1, order)), 1)
    return ids, torch.cat((torch.full_like(told, -100), values.gather(1, order)), 1)


def _lesson(size: Size, pairs: int, device: str, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """As many tokens as of `pairs`, in rows with 8, 4, 2 or 1 times fewer pairs."""
    times = 1 << _LEVELS - 1 - step % _LEVELS
    return recall_batch(size.vocabulary, pairs // times, size.batch * times, seed * 10**6 + step, device)


@torch.no_grad()
def recall_accuracy(model: Any, size: Size, pairs: int, device: str) -> float:
    """Share of values that the model says rightly, of rows that no training saw."""
    ids, targets = recall_batch(size.vocabulary, pairs, 256, 10**9, device)
    right = sum(
        int((_logits(model, part, device).argmax(-1) == wanted).sum())
        for part, wanted in zip(ids.split(64), targets.split(64), strict=True)
    )
    return right / int((targets >= 0).sum())


def recall(pairs: int, channels: int, device: str, smoke: bool) -> Iterator[Row]:
    """Accuracy of each form over the seeds."""
    size = Size(256, 128, 2, 2, channels, 3 * pairs, 2000, 2048 // pairs)
    if smoke or device != "cuda":
        pairs, size = 8, Size(32, 16, 2, 1, 16, 24, 4, 4)
    stages = [(size.steps, size.batch, size.longest)]
    for form, config in _chosen(size):
        started, learner, found = time.perf_counter(), Learner(config, size, device), []
        for seed in SEEDS:
            model = learner.train(seed, partial(_lesson, size, pairs, device))
            found.append(100 * recall_accuracy(model, size, pairs, device))
        case = f"{form}, {pairs} pairs in {size.longest} tokens, heads of {size.channels}"
        yield row(AREA, case, "recall", statistics.fmean(found), "%", device=device, lower_is_better=False,
                  runs=len(found), note=_note(found, config, stages, started))  # fmt: skip


def _note(found: list[float], config: Any, stages: list[tuple[int, int, int]], started: float) -> str:
    each, spread = ", ".join(f"{x:.4g}" for x in found), max(found) - min(found)
    steps = ", ".join(f"{steps} steps of {batch} rows of {length} tokens" for steps, batch, length in stages)
    return (
        f"seeds {each}, spread {spread:.3g}; {_parameters(config)} parameters, {steps}, "
        f"{time.perf_counter() - started:.0f} s"
    )


# -- text and tasks ---------------------------------------------------------------------------------------------------

_ASKED = {"needle": {"keys": 8}, "copy": {"letters": 32}}  # two of tiny-long's tasks, with its options


def pretraining(device: str, smoke: bool) -> Iterator[Row]:
    """What each form learns of tiny-long's data, first in many short rows: bits a byte of held-out text, by position to
    16384, and answers to tasks, by length."""
    is_small = smoke or device != "cuda"
    size, stages = Size(264, 256, 4, 4, 64, 2048, 1800, 8, 2e-3), [(1500, 64, 256), (300, 8, 2048)]
    read, lengths, count = 16384, [256, 1024, 4096, 16384], 128
    if is_small:
        size, stages = Size(264, 16, 2, 1, 16, 128, 2, 1), [(1, 2, 112), (1, 1, 128)]
        read, lengths, count = 128, [112, 128], 2
    config, corpora = _tiny_long(stages)
    kept = torch.cat([torch.from_numpy(corpus.held_out.astype(np.int64)) for corpus in corpora.values()])
    held_out = kept[: len(kept) // read * read].view(-1, read)[: 1 if is_small else None].to(device)
    asked = {(task, length): _examples(task, length, count, device) for length in lengths for task in _ASKED}
    rows = cache(lambda seed: _batches(replace(config, seed=seed), corpora, 0 if is_small else 8, device))

    def batch(seed: int, step: int) -> tuple[Tensor, Tensor]:
        ids, targets = rows(seed)[step].long()
        return ids, targets

    kind = "tiny-long's data" if os.environ.get("EFFPASS_DATA") else "tiny-long's code and tasks"
    for form, made in _chosen(size):
        started, learner = time.perf_counter(), Learner(made, size, device)
        losses: dict[tuple[int, int], list[float]] = {}
        answers: dict[tuple[str, int], list[float]] = {}
        for seed in SEEDS:
            model = learner.train(seed, batch, (0, size.steps - 1))
            bits = _bits(model, held_out, device)
            for first, last in _spans(read):
                losses.setdefault((first, last), []).append(float(bits[first:last].mean()))
            for which, (ids, answer, _) in asked.items():
                answers.setdefault(which, []).append(100 * _answered(model, ids, answer, device))
        for (first, last), found in losses.items():
            yield row(AREA, f"{form}, {kind}", f"loss of tokens {first} to {last}", statistics.fmean(found), "bits",
                      device=device, runs=len(found), note=_note(found, made, stages, started))  # fmt: skip
        for (task, length), found in answers.items():
            note = f"{_note(found, made, stages, started)}; chance {100 * asked[task, length][2]:.3g} %"
            yield row(AREA, f"{form}, {kind}", f"{task} answered in {length} bytes", statistics.fmean(found), "%",
                      device=device, lower_is_better=False, runs=len(found), note=note)  # fmt: skip


def _tiny_long(stages: list[tuple[int, int, int]]) -> tuple[Config, dict[int, Corpus]]:
    """Its config with these stages, and the text of its sources; without EFFPASS_DATA, of those that don't need it."""
    config = load_config(MODELS / "tiny-long" / "config.yaml")
    data = config.data
    if not os.environ.get("EFFPASS_DATA"):
        data = [source for source in data if "$EFFPASS_DATA" not in "".join(source.text or ())]
    config = replace(
        config, data=data, schedule=Schedule(warmup=0),
        stages=[Stage(steps, length + 1, batch) for steps, batch, length in stages],
    )  # fmt: skip
    return config, {i: _corpus(tuple(source.text), None) for i, source in enumerate(data) if source.text}


def _batches(config: Config, corpora: dict[int, Corpus], workers: int, device: str) -> list[Tensor]:
    """Ids and targets of each step, int16 [2, B, T]."""
    found = []
    for batch in make_loader(MicroBatches(config, corpora), 0, workers, pin=False):
        ids = batch["input_ids"].short()
        targets = ids.where(batch["weights"] > 0, -100)
        found.append(torch.stack((ids[:, :-1], targets[:, 1:])))
    parts = torch.cat([x.flatten() for x in found]).to(device).split([x.numel() for x in found])  # one copy
    return [part.view(x.shape) for part, x in zip(parts, found, strict=True)]


def _examples(task: str, length: int, count: int, device: str) -> tuple[Tensor, int, float]:
    """Ids `[count, length]`, how many of the last are the answer, and the share of guesses that are right."""
    rngs = [np.random.default_rng((7, length, i)) for i in range(count)]
    examples = [make_example(task, rng, length, 1, _ASKED[task]) for rng in rngs]
    ids = torch.from_numpy(np.stack([byte_ids(example.text) for example in examples]).astype(np.int64))
    return ids.to(device), len(examples[0].pairs[0][1]), examples[0].chance


@torch.no_grad()
def _answered(model: Any, ids: Tensor, answer: int, device: str) -> float:
    """Share of rows whose last `answer` bytes greedy decoding gives, all of them."""
    right = torch.zeros((), device=device)
    for part in ids.split(max(1, (1 << 17) // ids.shape[1])):
        said = _logits(model, part, device, answer + 1)[:, :-1].argmax(-1)
        right += (said == part[:, -answer:]).all(1).sum()
    return float(right) / len(ids)


@torch.no_grad()
def _bits(model: Any, ids: Tensor, device: str) -> Tensor:
    """Bits a byte of each position but the first, mean over rows, on the CPU."""
    total = torch.zeros(ids.shape[1] - 1, device=device)
    for part in ids.split(max(1, 16384 // ids.shape[1])):
        total += _losses(model, part[:, :-1], part[:, 1:], device).view(len(part), -1).sum(0)
    return (total / len(ids) / math.log(2)).cpu()


def _spans(length: int) -> Iterator[tuple[int, int]]:
    """Eight spans, each twice as long as the one before but for the first."""
    edges = [0, *(length >> level for level in range(7, -1, -1))]
    yield from itertools.pairwise(edges)


LOADS = ((16, 16), (32, 16), (64, 16), (64, 32))

CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    **{f"recall-{pairs}x{channels}": partial(recall, pairs, channels) for pairs, channels in LOADS},
    "pretraining": pretraining,
}
