"""Rows of tokens, as a function of their number: a resumed run reads what the whole run reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from effpass.core.errors import EffpassError
from effpass.trainers.finetune.samples import file_hash, read_lines
from effpass.trainers.lm.corpus import Corpus, TextFile, read_corpus, write_corpus

__all__ = ["Rows", "read_text", "tokenize"]

# Calibration reads other rows than training, as long as the text has that many.
_CALIBRATION = 1


def tokenize(path: Path, tokenizer: Any, folder: Path) -> None:
    """Write the tokens of a file to `folder`: plain text is one document, of JSON lines each is one, all its strings.

    Raises:
        EffpassError: not a file, not UTF-8, or a line without text; names file and line.
    """
    if not path.is_file():
        raise EffpassError(f"{path}: no such file", hint="a text, or JSON lines with a text in each")
    if path.suffix == ".jsonl":
        for number, row in read_lines(path):
            if not any(isinstance(value, str) and value for value in row.values()):
                raise EffpassError(
                    f"{path}:{number}: no text; it has {', '.join(map(repr, row)) or 'no fields'}",
                    hint='{"text": "…"}, or any fields that are strings',
                )
    if tokenizer.eos_token_id is None:
        raise EffpassError("the tokenizer has no end-of-text token, by which a document ends")
    file = TextFile(str(path), path.name, file_hash(path), path.stat().st_size)
    write_corpus(folder, [file], tokenizer, 0.0, 0, str(path))


def read_text(folder: Path, batch: int, length: int, path: object) -> Corpus:
    """What :func:`tokenize` wrote.

    Raises:
        EffpassError: fewer tokens than a batch takes.
    """
    corpus = read_corpus(folder)
    if len(corpus.training) < batch * length:
        raise EffpassError(
            f"{path}: {len(corpus.training)} tokens, and a batch of {batch} rows takes {batch * length}",
            hint="give more text, or a smaller --batch or --sequence-length",
        )
    return corpus


class Rows(Dataset[dict[str, Tensor]]):
    """Micro-batches of a run, in order.

    Args:
        corpus: tokens.
        batch, accumulate, length: rows of a step, micro-batches of it, tokens of a row.
        steps: of the run.
        seed: of the order.
        first: steps of earlier runs, whose rows are not read again.
    """

    def __init__(
        self, corpus: Corpus, batch: int, accumulate: int, length: int, steps: int, seed: int, first: int = 0
    ) -> None:
        self.corpus, self.size, self.length = corpus, batch // accumulate, length
        self.accumulate, self.steps, self.seed, self.first = accumulate, steps, seed, first

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __getitem__(self, micro: int) -> dict[str, Tensor]:
        """``input_ids`` int64 `[B, T]`."""
        start = (self.first * self.accumulate + micro) * self.size
        return {"input_ids": _rows(self.corpus, start, self.size, self.length, (self.seed,))}

    def calibration(self, count: int) -> list[Tensor]:
        """`count` micro-batches `[B, T]` in an order of their own."""
        key = (self.seed, _CALIBRATION)
        return [_rows(self.corpus, i * self.size, self.size, self.length, key) for i in range(count)]


def _rows(corpus: Corpus, start: int, size: int, length: int, key: tuple[int, ...]) -> Tensor:
    rows = [corpus.sequence(start + i, length, key) for i in range(size)]
    return torch.from_numpy(np.stack(rows).astype(np.int64))
