"""Area `prefix_kv`, pictures: what a model says of a picture when a part of the cache that holds it was kept.

As in :mod:`benchmarks.prefix_kv`, a prompt is run once, and every method chooses from the same keys. A prompt is a
picture with a question behind it, as LLaVA has them, or the picture alone, and the question comes after the choice. All
methods protect four first and four last tokens: the pass's own 4 and 32 are more than a tenth of such a prompt. The
profile is learned from captions of other pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks import quality_pictures
from benchmarks.prefix_kv import AREA, BUDGETS, _compared, _methods, _Prompt
from benchmarks.quality import SEEDS
from benchmarks.quality_pictures import _drawn, _taken
from benchmarks.rows import Row, row
from effpass.runtime.attention import reading_cache
from effpass.runtime.prefix_kv.budget import Budget
from effpass.runtime.prefix_kv.calibrate import calibrate
from effpass.runtime.prefix_kv.peers.uniform import Uniform
from effpass.runtime.prefix_kv.plan import Settings
from effpass.trainers.lm.pictures import PICTURES, Picture
from effpass.trainers.lm.pictures_input import PictureInput, model_inputs
from effpass.trainers.lm.tokenizer import END, PAD

SINK, RECENT = 4, 4
IN_PROMPT, AFTERWARDS = "asked in the prompt", "asked afterwards"
_CAPTIONS, _QUESTIONS, _BATCH = 24, 12, 12  # pictures of a seed, and of a batch
_LEARNED = 8
_WHOLE = (1.0, "")


def of_model(model: Any, told: str, device: str, smoke: bool) -> Iterator[Row]:
    """Rows of the profile, of captions, and of each kind of question."""
    taken = _taken(model)
    learned = _drawn("caption", len(SEEDS), 1 if smoke else _LEARNED, taken)  # another seed than those that are asked
    profile = calibrate(model, [_inputs(model, taken, [picture], IN_PROMPT) for picture in learned], sink=SINK,
                        recent=RECENT)  # fmt: skip
    for budget in BUDGETS:
        shares = profile.at(budget)
        yield row(AREA, f"{told}, pictures", f"smallest share of a layer at {budget:.0%}", 100 * min(shares), "%",
                  device=device, runs=len(learned),
                  note=f"shares of the layers: {', '.join(f'{share:.0%}' for share in shares)}")  # fmt: skip
    yield from _captions(model, told, taken, profile, device, 2 if smoke else _CAPTIONS)
    for kind in PICTURES:
        if kind != "caption":
            for asked in (IN_PROMPT, AFTERWARDS):
                yield from _answers(model, told, taken, kind, asked, profile, device, 2 if smoke else _QUESTIONS)


def tiny(device: str) -> tuple[Any, Any, str]:
    """A random model for smoke runs, whose pictures take enough tokens to learn a profile."""
    return quality_pictures.tiny(device, size=168, positions=512)


def _captions(model: Any, told: str, taken: PictureInput, profile: Any, device: str, count: int) -> Iterator[Row]:
    """Log-perplexity of a caption's tokens; the first follows from the prompt alone and is left out."""
    losses: dict[tuple[float, str], list[float]] = {}
    for seed in SEEDS:
        found: dict[tuple[float, str], list[float]] = {}
        for key, logits, tail, is_graded in _after(
            model, taken, _drawn("caption", seed, count, taken), IN_PROMPT, profile
        ):
            nats = cross_entropy(logits.flatten(0, 1).float(), tail.flatten(), reduction="none").view_as(tail)
            found.setdefault(key, []).extend(nats[:, 1:][is_graded[:, 1:]].tolist())
        for key, values in found.items():
            losses.setdefault(key, []).append(mean(values))
    whole = losses.pop(_WHOLE)
    case = f"{told}, pictures, caption, {IN_PROMPT}"
    yield from _compared(case, "log-perplexity", losses, whole, device, count * len(SEEDS), False)


def _answers(
    model: Any, told: str, taken: PictureInput, kind: str, asked: str, profile: Any, device: str, count: int
) -> Iterator[Row]:
    """Share of right answers, every byte and the end of them."""
    right: dict[tuple[float, str], list[float]] = {}
    for seed in SEEDS:
        found: dict[tuple[float, str], list[bool]] = {}
        for key, logits, tail, is_graded in _after(model, taken, _drawn(kind, seed, count, taken), asked, profile):
            is_right = ((logits.argmax(-1) == tail) | ~is_graded).all(1)
            found.setdefault(key, []).extend(is_right.tolist())
        for key, values in found.items():
            right.setdefault(key, []).append(100 * mean(values))
    whole = right.pop(_WHOLE)
    case = f"{told}, pictures, {kind}, {asked}"
    yield from _compared(case, "answers right", right, whole, device, count * len(SEEDS), True)


def _after(
    model: Any, taken: PictureInput, drawn: list[Picture], asked: str, profile: Any
) -> Iterator[tuple[tuple[float, str], Tensor, Tensor, Tensor]]:
    """For batches of pictures and each (budget, method): logits `[B, t, vocab]`, tokens, and which of them are graded.

    Prompts of a batch are equally long; what follows is padded on the right.
    """
    text = model.config.get_text_config(decoder=True)
    settings = {_WHOLE: Settings(Uniform(), Budget(ratio=1.0))}
    for budget in BUDGETS:
        settings |= {(budget, name): s for name, s in _methods(budget, profile, text.head_dim).items()}
    for part in _batches(drawn, asked):
        inputs = _inputs(model, taken, part, asked)
        texts = [(b"" if asked == IN_PROMPT else p.pairs[0][0], p.pairs[0][1]) for p in part]
        tails = [[*question, *answer, END] for question, answer in texts]
        longest = max(map(len, tails))
        tail = torch.tensor([ids + [PAD] * (longest - len(ids)) for ids in tails], device=model.device)
        place = torch.arange(longest, device=model.device)
        starts, ends = (torch.tensor(n, device=model.device)[:, None]
                        for n in ([len(q) for q, _ in texts], [len(ids) for ids in tails]))  # fmt: skip
        with reading_cache(model):
            prompt = _Prompt(model, inputs.pop("input_ids"), **inputs)
            for key, chosen in settings.items():
                logits = prompt.logits(replace(chosen, sink=SINK, recent=RECENT), tail[:, :-1])
                yield key, logits, tail, (place >= starts) & (place < ends)


def _batches(drawn: list[Picture], asked: str) -> Iterator[list[Picture]]:
    """Pictures whose prompts are equally long, up to 12 together."""
    lengths = [len(picture.pairs[0][0]) if asked == IN_PROMPT else 0 for picture in drawn]
    for length in sorted(set(lengths)):
        alike = [picture for picture, n in zip(drawn, lengths, strict=True) if n == length]
        for first in range(0, len(alike), _BATCH):
            yield alike[first : first + _BATCH]


def _inputs(model: Any, taken: PictureInput, drawn: list[Picture], asked: str) -> dict[str, Tensor]:
    """The prompts of pictures, as the model takes them."""
    questions = [[*picture.pairs[0][0]] if asked == IN_PROMPT else [] for picture in drawn]
    ids = torch.tensor([[taken.token] * taken.tokens + question for question in questions], device=model.device)
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in drawn])).to(model.device)
    inputs = model_inputs({"input_ids": ids, "pixels": pixels})
    return {**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}
