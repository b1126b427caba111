"""Training data of a pruning run: fixed-length sequences of tokens, determined by their index and a seed.

A resumed run therefore reads the same data as an uninterrupted one. A *row* is one sequence of a batch.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from effpass.core.errors import EffpassError
from effpass.core.whole import write_text
from effpass.trainers.finetune.samples import file_hash, read_lines
from effpass.trainers.lm.corpus import Corpus, TextFile, read_corpus, write_corpus
from effpass.trainers.run_folder import RUN

__all__ = ["Rows", "begin_run", "read_text", "tokenize"]

# Key of the order of calibration data, which differs from that of training data.
_CALIBRATION = 1


def tokenize(path: Path, tokenizer: Any, folder: Path) -> None:
    """Tokenize a file and write the tokens to `folder`.

    A plain text file is one document. In a JSON lines file, each line is one document, made of all its strings.

    Args:
        path: text file, or JSON lines file with the suffix ``.jsonl``.
        tokenizer: tokenizer of the model.
        folder: folder to write.

    Raises:
        EffpassError: `path` is not a file, is not UTF-8, or has a line without text (the message names file and line),
            or the tokenizer has no end-of-text token.
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


def begin_run(
    work: Path,
    run: dict[str, Any],
    data: Path,
    validation: Path | None,
    tokenizer: Any,
    batch: int,
    sequence_length: int,
) -> None:
    """Tokenize the texts of a run and record it in its folder `work`, which is removed again if that fails.

    Args:
        work: folder of the run.
        run: description of the run, which a resumed run is compared with.
        data: text to train on.
        validation: held-out text; None for none.
        tokenizer: tokenizer of the model.
        batch: sequences of a batch, B; the text must fill one.
        sequence_length: tokens per sequence, T.

    Raises:
        EffpassError: a text can't be read, or is too short for one batch.
    """
    try:
        for path, name, rows in ((data, "data", batch), (validation, "validation", 1)):
            if path is not None:
                tokenize(path, tokenizer, work / name)
                read_text(work / name, rows, sequence_length, path)
        write_text(work / RUN, json.dumps(run, indent=2))
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)  # it holds no results yet
        raise


def read_text(folder: Path, batch: int, length: int, path: object) -> Corpus:
    """Read the tokens that :func:`tokenize` has written.

    Args:
        folder: folder written by :func:`tokenize`.
        batch: minimum number of sequences that the tokens must suffice for.
        length: number of tokens per sequence.
        path: original file, for error messages.

    Raises:
        EffpassError: there are fewer tokens than one batch needs.
    """
    corpus = read_corpus(folder)
    if len(corpus.training) < batch * length:
        raise EffpassError(
            f"{path}: {len(corpus.training)} tokens, and a batch of {batch} rows takes {batch * length}",
            hint="give more text, or a smaller --batch or --sequence-length",
        )
    return corpus


class Rows(Dataset[dict[str, Tensor]]):
    """Dataset of the micro-batches of a training loop, in order.

    Args:
        corpus: tokens.
        batch, accumulate, length: number of sequences per optimizer step, number of micro-batches per step, and number
            of tokens per sequence.
        steps: number of optimizer steps of the loop.
        seed: seed of the order.
        first: number of steps of earlier loops, whose data is skipped.
    """

    def __init__(
        self, corpus: Corpus, batch: int, accumulate: int, length: int, steps: int, seed: int, first: int = 0
    ) -> None:
        self.corpus, self.size, self.length = corpus, batch // accumulate, length
        self.accumulate, self.steps, self.seed, self.first = accumulate, steps, seed, first

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __getitem__(self, micro: int) -> dict[str, Tensor]:
        """Return a micro-batch, ``input_ids`` int64 `[B, T]`."""
        start = (self.first * self.accumulate + micro) * self.size
        return {"input_ids": _rows(self.corpus, start, self.size, self.length, (self.seed,))}

    def calibration(self, count: int) -> list[Tensor]:
        """Return `count` micro-batches `[B, T]` of calibration data, in an order different from that of training."""
        key = (self.seed, _CALIBRATION)
        return [_rows(self.corpus, i * self.size, self.size, self.length, key) for i in range(count)]


def _rows(corpus: Corpus, start: int, size: int, length: int, key: tuple[int, ...]) -> Tensor:
    rows = [corpus.sequence(start + i, length, key) for i in range(size)]
    return torch.from_numpy(np.stack(rows).astype(np.int64))
