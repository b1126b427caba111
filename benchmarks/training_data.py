"""Token rows that the runs of area `training` read: a batch is `(ids, weights)`, both `[B, T]`.

`weights` says which tokens are graded: 1 where the loss of predicting a token from those before counts, 0 elsewhere.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effpass.trainers.lm.corpus import Corpus, find_files, read_corpus, write_corpus

__all__ = ["CODE", "TEXT", "Rows", "instruction_rows", "text_rows"]

CODE = tuple(
    f"$STDLIB/{pattern}"
    for pattern in (
        "*.py", "asyncio/*.py", "concurrent/**/*.py", "email/*.py", "http/*.py", "importlib/**/*.py", "json/*.py",
        "logging/*.py", "multiprocessing/*.py", "unittest/*.py", "urllib/*.py", "xml/**/*.py",
    )
)  # fmt: skip
TEXT = ("$EFFPASS_DATA/text/*.txt", "$EFFPASS_DATA/gsm8k/train.jsonl", *CODE)
_HELD_OUT = 0.02
# Of each kind of held-out rows in fine-tuning, and of GSM8K's test problems.
_EVALUATED = 128


@dataclass(frozen=True)
class Rows:
    """What one run reads.

    Attributes:
        ids: int32 `[steps, B, T]`.
        weights: bool, of the same shape; None where every token is graded.
        held_out: kind of text → (ids `[N, T]`, weights `[N, T]` or None).
    """

    ids: Tensor
    weights: Tensor | None
    held_out: dict[str, tuple[Tensor, Tensor | None]]

    def batch(self, step: int, device: str) -> tuple[Tensor, Tensor | None]:
        """On `device`; nothing waits for it."""
        ids = self.ids[step].to(device, non_blocking=True)
        return ids, None if self.weights is None else self.weights[step].to(device, non_blocking=True)


def text_rows(patterns: tuple[str, ...], steps: int, batch: int, length: int, seed: int) -> Rows:
    """Bytes of the files, each read once before any is read again, in an order drawn by `seed`; the last 2 % of blocks
    drawn by seed 0 are held out of all runs alike."""
    corpus = _corpus(patterns, None)
    ids = _sequences(corpus, steps * batch, length, seed).view(steps, batch, length)
    return Rows(ids, None, {"text": (_held_out(corpus, length), None)})


def instruction_rows(checkpoint: str, steps: int, batch: int, length: int, seed: int) -> Rows:
    """GSM8K's training problems, graded on the answers (half of each batch), code and text (a quarter each).

    Held out: GSM8K's test problems, graded on the answers; blocks of the same code; WikiText-2's validation text, which
    is of another kind than the text that is trained on.
    """
    data = _data()
    problems, graded = _problems(checkpoint, data / "gsm8k" / "train.jsonl")
    rng = np.random.default_rng(seed)
    share = batch // 4
    chosen = _packed(problems, graded, steps * (batch - 2 * share), length, rng)
    corpora = [_corpus(patterns, checkpoint) for patterns in (CODE, ("$EFFPASS_DATA/text/*.txt",))]
    plain = [_sequences(corpus, steps * share, length, seed).view(steps, share, length) for corpus in corpora]
    ids = torch.cat([chosen[0].view(steps, -1, length), *plain], 1)
    weights = torch.cat([chosen[1].view(steps, -1, length), *(torch.ones_like(p, dtype=torch.bool) for p in plain)], 1)
    tests, answers = _problems(checkpoint, data / "gsm8k" / "test.jsonl")
    wikitext = (data / "wikitext-2" / "valid.txt").read_text(encoding="utf-8")
    general = torch.from_numpy(_encode(checkpoint, wikitext))
    held_out = {
        "mathematics": _padded(tests[:_EVALUATED], answers[:_EVALUATED], length),
        "code": (_held_out(corpora[0], length)[:_EVALUATED], None),
        "text": (general[: len(general) // length * length].view(-1, length)[:_EVALUATED], None),
    }
    return Rows(ids, weights, held_out)


def _data() -> Path:
    place = os.environ.get("EFFPASS_DATA")
    if place is None:
        raise SystemExit("training: set EFFPASS_DATA (or --data) to the folder that holds text/, gsm8k/, wikitext-2/")
    return Path(place)


@functools.cache
def _corpus(patterns: tuple[str, ...], checkpoint: str | None) -> Corpus:
    files = find_files(list(patterns), Path.cwd(), "training")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = None if checkpoint is None else _tokenizer(checkpoint)
        write_corpus(Path(folder), files, tokenizer, _HELD_OUT, 0, "training")
        corpus = read_corpus(Path(folder))
        return Corpus(np.array(corpus.training), np.array(corpus.held_out))


def _sequences(corpus: Corpus, count: int, length: int, seed: int) -> Tensor:
    rows = np.stack([corpus.sequence(i, length, (seed,)) for i in range(count)])
    return torch.from_numpy(rows.astype(np.int32))


def _held_out(corpus: Corpus, length: int) -> Tensor:
    kept = corpus.held_out[: len(corpus.held_out) // length * length].astype(np.int32)
    return torch.from_numpy(kept).view(-1, length)


# -- problems with answers -----------------------------------------------------------------------------------------


@functools.cache
def _tokenizer(checkpoint: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)


def _encode(checkpoint: str, text: str) -> np.ndarray:
    return np.array(_tokenizer(checkpoint)(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)


@functools.cache
def _problems(checkpoint: str, path: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ids of each problem with its answer and an end token behind, and which of them are the answer's."""
    ids, graded = [], []
    end = np.array([_tokenizer(checkpoint).eos_token_id], dtype=np.int32)
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        question = _encode(checkpoint, f"Question: {entry['question']}\nAnswer: ")
        answer = np.concatenate([_encode(checkpoint, entry["answer"]), end])
        ids.append(np.concatenate([question, answer]))
        graded.append(np.arange(len(ids[-1])) >= len(question))
    return ids, graded


def _packed(
    ids: list[np.ndarray], graded: list[np.ndarray], count: int, length: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """`count` rows of problems one after the other, in as many shuffled passes as it takes."""
    need, have = count * length, 0
    order: list[int] = []
    while have < need:
        drawn = rng.permutation(len(ids))
        order += drawn.tolist()
        have += sum(map(len, ids))
    flat = np.concatenate([ids[i] for i in order])[:need]
    marks = np.concatenate([graded[i] for i in order])[:need]
    return torch.from_numpy(flat).view(count, length), torch.from_numpy(marks).view(count, length)


def _padded(ids: list[np.ndarray], graded: list[np.ndarray], length: int) -> tuple[Tensor, Tensor]:
    """One problem a row; those longer than a row are left out on both sides of a comparison alike."""
    fits = [i for i, problem in enumerate(ids) if len(problem) <= length]
    rows = torch.zeros(len(fits), length, dtype=torch.int32)
    marks = torch.zeros(len(fits), length, dtype=torch.bool)
    for row, i in enumerate(fits):
        rows[row, : len(ids[i])] = torch.from_numpy(ids[i])
        marks[row, : len(ids[i])] = torch.from_numpy(graded[i])
    return rows, marks
