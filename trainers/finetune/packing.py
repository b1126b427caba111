"""Micro-batches of packed samples as a pure function of their index: a resumed run reads the same data as a whole one.

Samples are shuffled in each epoch and packed into rows, each into the first open row with room. A row is one sequence
of the model. Positions start at 0 in every sample of a row, from which transformers recognizes the samples and keeps
them from attending to each other.

Every graded token, one whose prediction the loss counts, has the same weight in an optimizer step, however the step is
divided into rows, micro-batches and processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from effpass.core.errors import EffpassError
from effpass.trainers.finetune.samples import Sample

__all__ = ["PackedBatches", "check_lengths", "make_rows", "pack", "row_length"]

# Maximum number of open rows: few enough to keep the order of samples random, and enough to fill rows well.
_OPEN = 64
_ROUND = 64  # rows are padded to a multiple of this number of tokens


def row_length(samples: Sequence[Sample]) -> int:
    """Return the number of tokens per row that the longest sample needs."""
    return -(-max(len(sample.tokens) for sample in samples) // _ROUND) * _ROUND


def check_lengths(samples: Sequence[Sample], length: int, path: object, most: int) -> None:
    """Raise EffpassError if samples are longer than `length` tokens.

    Args:
        samples: samples of the file.
        length: number of tokens per row.
        path: file of the samples, for the message.
        most: maximum number of tokens per row that the model allows, for the hint.
    """
    longest = max(samples, key=lambda sample: len(sample.tokens))
    count = sum(len(sample.tokens) > length for sample in samples)
    if count:
        way_out = f"--sequence-length {len(longest.tokens)}, or " if len(longest.tokens) <= most else ""
        raise EffpassError(
            f"{path}:{longest.line}: {len(longest.tokens)} tokens, and a row has {length}"
            + (f" ({count} lines are too long)" if count > 1 else ""),
            hint=f"{way_out}shorten or remove them: nothing is cut off",
        )


def pack(samples: Sequence[Sample], order: Sequence[int], length: int) -> list[list[int]]:
    """Pack samples into rows of at most `length` tokens, and return the indices of the samples of each row."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # row, tokens left
    for number in order:
        size = len(samples[number].tokens)
        place = next((i for i, (_, left) in enumerate(room) if left >= size), None)
        if place is None:
            rows.append([])
            room.append((len(rows) - 1, length))
            place = len(room) - 1
        row, left = room[place]
        rows[row].append(number)
        room[place] = (row, left - size)
        if left == size:
            room.pop(place)
        elif len(room) > _OPEN:
            room.pop(min(range(len(room)), key=lambda i: room[i][1]))
    return rows


class PackedBatches(Dataset[dict[str, torch.Tensor]]):
    """Micro-batches of a run, in order.

    Args:
        samples: all samples.
        length: number of tokens T per row.
        batch: number of rows per optimizer step, over all processes.
        accumulate: number of micro-batches per process and step.
        steps: number of optimizer steps; None to train for `epochs`.
        epochs: number of passes over the samples if `steps` is None; the last step then has the remaining rows.
        seed: seed of the order.
        is_packed: whether a row holds several samples; otherwise it holds one and padding.
        pad: token id that fills rows.
        rank, world: index of this process among those that read different data, and their number.

    Attributes:
        steps: number of optimizer steps.
        passes: number of passes over the samples, which may be fractional.

    Raises:
        EffpassError: if a batch can't be divided among the processes and micro-batches.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        length: int,
        batch: int,
        accumulate: int = 1,
        steps: int | None = None,
        epochs: int = 1,
        seed: int = 0,
        is_packed: bool = True,
        pad: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch % (accumulate * world):
            raise EffpassError(
                f"a batch of {batch} rows can't be shared by {world} processes with {accumulate} micro-batches each",
                hint="make --batch a multiple of the processes times --accumulate",
            )
        self.samples, self.length, self.batch, self.accumulate = samples, length, batch, accumulate
        self.is_packed, self.pad, self.rank, self.world = is_packed, pad, rank, world
        self.rows: list[list[int]] = []
        epoch = 0
        while len(self.rows) < steps * batch if steps is not None else epoch < epochs:
            order = np.random.default_rng((seed, epoch)).permutation(len(samples)).tolist()
            self.rows += pack(samples, order, length) if is_packed else [[number] for number in order]
            epoch += 1
        self.steps = math.ceil(len(self.rows) / batch) if steps is None else steps
        self.passes = epoch * min(1.0, self.steps * batch / len(self.rows))

    def __len__(self) -> int:
        return self.steps * self.accumulate

    @property
    def filling(self) -> float:
        """Share of the positions in the rows that hold tokens of samples."""
        rows = self.rows[: self.steps * self.batch]
        return sum(len(self.samples[n].tokens) for row in rows for n in row) / (len(rows) * self.length)

    def __getitem__(self, micro: int) -> dict[str, torch.Tensor]:
        """Return micro-batch number `micro` of this process.

        Returns:
            ``input_ids`` and ``position_ids``, int64 `[B, T]`; ``weights``, float32 `[B, T]`, the weight in the loss of
            predicting each token from those before it. The weight of a graded token is the number of micro-batches that
            are averaged, divided by the number of graded tokens in the step; that of other tokens is 0.
        """
        step, part = divmod(micro, self.accumulate)
        rows = self.rows[step * self.batch : (step + 1) * self.batch]
        graded = sum(int(self.samples[n].graded.sum()) for row in rows for n in row)
        size = self.batch // (self.accumulate * self.world)
        first = (part * self.world + self.rank) * size
        mine = rows[first : first + size]
        mine += [[]] * (size - len(mine))  # the last step may have fewer rows
        length = self.length
        if not self.is_packed:
            longest = max((len(self.samples[n].tokens) for row in rows for n in row), default=1)
            length = min(length, -(-longest // _ROUND) * _ROUND)
        batch = make_rows([[self.samples[n] for n in row] for row in mine], length, self.pad)
        weights = batch.pop("graded").float() * (self.accumulate * self.world / graded)
        del batch["sample"]
        return {**batch, "weights": weights}


def make_rows(rows: Sequence[Sequence[Sample]], length: int, pad: int) -> dict[str, torch.Tensor]:
    """Concatenate samples to rows, followed by padding whose positions continue those of the last sample.

    Args:
        rows: samples of each row.
        length: number of tokens T per row.
        pad: token id of the padding.

    Returns:
        ``input_ids`` and ``position_ids``, int64 `[B, T]`; ``graded``, bool `[B, T]`; ``sample``, int64 `[B, T]`, the
        index of the sample that each token belongs to, counted over all rows, and 0 for padding.
    """
    ids = np.full((len(rows), length), pad, dtype=np.int64)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    graded = np.zeros((len(rows), length), dtype=bool)
    owner = np.zeros((len(rows), length), dtype=np.int64)
    number = 0
    for i, row in enumerate(rows):
        at = begin = 0
        for sample in row:
            begin, end = at, at + len(sample.tokens)
            ids[i, at:end], graded[i, at:end] = sample.tokens, sample.graded
            positions[i, at:end] = np.arange(end - at)
            owner[i, at:end] = number
            number += 1
            at = end
        positions[i, at:] = np.arange(at - begin, length - begin)  # not a sequence of its own, and never attended to
    names = ("input_ids", "position_ids", "graded", "sample")
    return {name: torch.from_numpy(array) for name, array in zip(names, (ids, positions, graded, owner), strict=True)}
