"""What the cases of area `speculative` share: the trained model and its prompts, trees, and CUDA graphs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import effpass
from benchmarks.backend import _dtype
from benchmarks.decode import NO_PASSES
from benchmarks.speculative_data import SETS
from effpass.runtime.cuda_graph import record

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
