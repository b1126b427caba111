"""What the cases of area `speculative` share: the trained model and its prompts, trees, and CUDA graphs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

import effpass
from benchmarks.backend import _dtype
from benchmarks.decode import NO_PASSES
from benchmarks.speculative_data import SETS
from effpass.runtime.cuda_graph import record
from effpass.runtime.speculative import Speculator
from effpass.runtime.speculative.generation import generate
from effpass.runtime.speculative.open_draft import open_draft

AREA = "speculative"
PROMPT = 512
_ROWS = 16  # prompts that are answered together where only counts matter


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


@cache
def _model(device: str, smoke: bool) -> tuple[Any, Any, str]:
    """A prepared model, its tokenizer, and its name."""
    name = os.environ.get("EFFPASS_MODEL", "smollm2")
    loaded = effpass.load_model(name, dtype=_dtype(device))
    model = loaded.model.to(device)
    return effpass.prepare(model, NO_PASSES), loaded.tokenizer, Path(name).name


def _drafts() -> list[str]:
    """Those in EFFPASS_DRAFT; a comma between digits belongs to `layers:0,1`."""
    return re.split(r",(?!\d)", os.environ.get("EFFPASS_DRAFT", "ngram"))


def _sets(smoke: bool) -> Sequence[str]:
    chosen = os.environ.get("EFFPASS_SETS")
    return chosen.split(",") if chosen else SETS[:1] if smoke else SETS


def _batches(prompts: Sequence[Tensor], width: int) -> list[tuple[Tensor, Tensor]]:
    """Ids and attention masks `[B, width]` of up to 16 prompts `[1, T]` each, padded on the left."""
    padded = [
        (pad(ids, (width - ids.shape[1], 0)), pad(torch.ones_like(ids), (width - ids.shape[1], 0))) for ids in prompts
    ]
    groups = [padded[first : first + _ROWS] for first in range(0, len(padded), _ROWS)]
    return [(torch.cat([ids for ids, _ in group]), torch.cat([mask for _, mask in group])) for group in groups]


class Answering:
    """Answers of equal lengths by speculation that never switches itself off.

    Args:
        draft, tree: as for `generate`.
        new: tokens of an answer.
    """

    def __init__(self, model: Any, draft: str, tree: str | None, new: int) -> None:
        engine = model.effpass_engine
        self.model, self.new = model, new
        self.speculator = Speculator(engine, open_draft(engine, draft, tree), switches=False)

    def __call__(self, batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], np.ndarray]:
        """Texts `[1, T]` with their prompts, and the numbers of rounds, verified nodes and tokens."""

        def loop(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
            return generate(self.speculator, input_ids, **prepared)

        texts, totals = [], np.zeros(3)
        for ids, mask in batches:
            found = type(self.model).generate(
                self.model, ids, attention_mask=mask, max_new_tokens=self.new, do_sample=False, eos_token_id=None,
                pad_token_id=0, custom_generate=loop,
            )  # fmt: skip
            texts += [line[None, int((~of.bool()).sum()) :] for line, of in zip(found, mask, strict=True)]
            last = self.speculator.last
            assert last is not None
            totals += (last.rounds, last.verified, last.tokens)
        return texts, totals


def _ids(tokenizer: Any, text: str, device: str) -> Tensor:
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)["input_ids"]
    return ids[:, -1536:].to(device)
