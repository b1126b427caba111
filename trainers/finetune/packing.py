"""Micro-batches of packed samples, as a pure function of their number: a resumed run reads what the whole run reads.

Samples are shuffled anew in each epoch and put into rows, each into the first open row with room. Positions start at 0
in every sample; transformers sees from them that a row holds several, and lets none attend to another.

Each graded token weighs the same in an optimiser step, however the step is cut into rows, micro-batches and processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from effpass.core.errors import EffpassError
from effpass.trainers.finetune.samples import Sample

__all__ = ["PackedBatches", "check_lengths", "make_rows", "pack"]

# Rows that are open at a time: the order of samples stays random, and rows get full.
_OPEN = 64
_ROUND = 64  # unpacked rows are padded to a multiple of it


def check_lengths(samples: Sequence[Sample], length: int, path: object, most: int) -> None:
    """Raise EffpassError for samples longer than `length` tokens; a row can have `most`."""
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
    """Rows of at most `length` tokens: for each the numbers of its samples."""
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
    """The run's micro-batches, in order.

    Args:
        samples: all.
        length: tokens T of a row.
        batch: rows of an optimiser step, over all processes.
        accumulate: micro-batches that a process runs for one step.
        steps: optimiser steps; None for those of `epochs`.
        epochs: passes over the samples, where `steps` is None. The last step then has what is left.
        seed: of the order.
        is_packed: several samples in a row; else one, padded.
        pad: token that fills rows.
        rank, world: this process, and how many there are.

    Attributes:
        steps: optimiser steps.
        passes: how often they read the samples.

    Raises:
        EffpassError: a batch can't be shared out.
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
        """Share of the rows' places that hold tokens."""
        rows = self.rows[: self.steps * self.batch]
        return sum(len(self.samples[n].tokens) for row in rows for n in row) / (len(rows) * self.length)

    def __getitem__(self, micro: int) -> dict[str, torch.Tensor]:
        """Micro-batch number `micro` of this process.

        Returns:
            ``input_ids``, ``position_ids`` int64 `[B, T]`; ``weights`` float32 `[B, T]` of predicting each token from
            those before, 1 for a graded one, over all graded tokens of the step, times the micro-batches that are
            averaged.
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
    """Samples side by side in rows, with padding behind that counts its positions anew.

    Returns:
        ``input_ids``, ``position_ids`` int64 `[B, T]`; ``graded`` bool `[B, T]`; ``sample`` int64 `[B, T]`, which of
        all samples a token belongs to, counted over the rows, padding to the first of them.
    """
    ids = np.full((len(rows), length), pad, dtype=np.int64)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    graded = np.zeros((len(rows), length), dtype=bool)
    owner = np.zeros((len(rows), length), dtype=np.int64)
    number = 0
    for i, row in enumerate(rows):
        at = 0
        for sample in row:
            end = at + len(sample.tokens)
            ids[i, at:end], graded[i, at:end] = sample.tokens, sample.graded
            positions[i, at:end] = np.arange(end - at)
            owner[i, at:end] = number
            number += 1
            at = end
        positions[i, at:] = np.arange(length - at)
    names = ("input_ids", "position_ids", "graded", "sample")
    return {name: torch.from_numpy(array) for name, array in zip(names, (ids, positions, graded, owner), strict=True)}
