"""Area `quality`, pictures: captions and questions, with all keys of the picture and with bad selections of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.quality import AREA, SEEDS, SELECTIONS, answer_rows, logits_after
from benchmarks.rows import Row, row
from effpass.trainers.lm.model import make_model, model_config
from effpass.trainers.lm.pictures import PICTURES, Picture, make_picture
from effpass.trainers.lm.pictures_input import PictureInput, model_inputs, picture_input
from effpass.trainers.lm.tokenizer import END, PAD, byte_tokenizer

# Pictures of a seed, and of a batch.
_COUNT, _BATCH = 128, 64
# A caption's row counts where a bad selection, or the picture of another caption, is worse by this factor.
_WORSE = 1.1
_OTHER = "another picture"


def question_rows(model: Any, name: str, device: str, smoke: bool) -> Iterator[Row]:
    """The share of right answers to each kind of question."""
    taken, count = _taken(model), 2 if smoke else _COUNT
    for kind in PICTURES:
        if kind == "caption":
            continue
        found: dict[str, list[float]] = {selection: [] for selection in SELECTIONS}
        for seed in SEEDS:
            drawn = _drawn(kind, seed, count, taken)
            for selection in SELECTIONS:
                is_wrong = torch.cat([is_wrong for _, is_wrong in _scored(model, taken, drawn, selection, seed)])
                found[selection].append(1 - is_wrong.float().mean().item())
        yield from answer_rows(f"{name}, pictures, {kind}", found, drawn[0].chance, count, device)


def caption_rows(model: Any, name: str, device: str, smoke: bool) -> Iterator[Row]:
    """The perplexity of a caption's token given the picture; the floor is given another picture."""
    taken, count = _taken(model), 2 if smoke else _COUNT
    found: dict[str, list[float]] = {selection: [] for selection in (*SELECTIONS, _OTHER)}
    for seed in SEEDS:
        drawn = _drawn("caption", seed, count, taken)
        others = [Picture(o.pixels, d.pairs, 0.0) for d, o in zip(drawn, drawn[1:] + drawn[:1], strict=True)]
        for selection in found:
            given, kind = (others, SELECTIONS[0]) if selection == _OTHER else (drawn, selection)
            losses = torch.cat([losses for losses, _ in _scored(model, taken, given, kind, seed)])
            found[selection].append(losses.mean().item())
    mean = {selection: math.exp(np.mean(values)) for selection, values in found.items()}
    dense = mean.pop(SELECTIONS[0])
    is_clear = max(mean[selection] for selection in SELECTIONS[1:]) >= _WORSE * dense <= mean[_OTHER]
    for selection, values in found.items():
        spread = f"{math.exp(min(values)):.4f} to {math.exp(max(values)):.4f} over {len(SEEDS)} seeds of pictures"
        is_dense = selection == SELECTIONS[0]
        yield row(
            AREA, f"{name}, pictures, caption", f"perplexity of a caption's token, {selection}",
            dense if is_dense else mean[selection], "", device=device, peer=None if is_dense else dense,
            peer_name="" if is_dense else SELECTIONS[0], runs=count * len(SEEDS),
            note=f"{spread}{'' if is_clear else '; no signal'}",
        )  # fmt: skip


def tiny(device: str, size: int = 56, positions: int = 256) -> tuple[Any, Any, str]:
    """A random model for smoke runs; pictures have `size` pixels a side."""
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": size, "patch_size": 14, "vision_use_head": False}  # fmt: skip
    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2}  # fmt: skip
    given = {"model_type": "llava", "vision_config": vision, "text_config": text, "vision_feature_layer": -1,
             "vision_feature_select_strategy": "full"}  # fmt: skip
    tokenizer = byte_tokenizer()
    return make_model(model_config(given, tokenizer, positions), None, 0).to(device).eval(), tokenizer, "random"


def _taken(model: Any) -> PictureInput:
    taken = picture_input(model.config)
    assert taken is not None
    return taken


def _drawn(kind: str, seed: int, count: int, taken: PictureInput) -> list[Picture]:
    rngs = [np.random.default_rng((seed, taken.size, i)) for i in range(count)]
    return [make_picture(kind, rng, taken.size) for rng in rngs]


def _scored(
    model: Any, taken: PictureInput, drawn: list[Picture], selection: str, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """For batches of pictures with their first question: nats of all answers' tokens, and which answers are wrong.

    The picture is the context that is selected from; question and answer follow, padded on the right.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    for first in range(0, len(drawn), _BATCH):
        part = drawn[first : first + _BATCH]
        pixels = torch.from_numpy(np.stack([picture.pixels for picture in part]))
        context = torch.full((len(part), taken.tokens), taken.token)
        inputs = model_inputs({"input_ids": context.to(model.device), "pixels": pixels.to(model.device)})
        texts = [[*picture.pairs[0][0], *picture.pairs[0][1], END] for picture in part]
        longest = max(map(len, texts))
        tail = torch.tensor([text + [PAD] * (longest - len(text)) for text in texts], device=model.device)
        starts = torch.tensor([len(picture.pairs[0][0]) for picture in part], device=model.device)
        ends = torch.tensor([len(text) for text in texts], device=model.device)
        logits = logits_after(
            model, inputs["input_ids"], tail, selection, generator, pixel_values=inputs["pixel_values"].to(model.dtype)
        )[:, :-1]
        place = torch.arange(1, longest, device=model.device)
        is_graded = (place >= starts[:, None]) & (place < ends[:, None])
        losses = cross_entropy(logits.float().flatten(0, 1), tail[:, 1:].flatten(), reduction="none")
        yield losses.view_as(is_graded)[is_graded], ((logits.argmax(-1) != tail[:, 1:]) & is_graded).any(1)
