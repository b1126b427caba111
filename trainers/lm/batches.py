"""Micro-batches as a pure function of their index: a run reads the same data however it is divided or interrupted.

The source of every sequence is drawn once for the whole run. A sequence is then the next one of its source: for text by
the order of the corpus, and for tasks and pictures from a random generator that is seeded with the sequence's number.

Every token has a *weight* in the loss, and the weights of a sequence sum to 1. A sequence of a task, in which few
tokens are graded (count in the loss), therefore counts as much as one of text, in which all are. The loss of a batch is
the mean over its sequences, which does not depend on how the batch is divided.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from effpass.core.errors import EffpassError
from effpass.trainers.lm.config import Config, Source, Stage
from effpass.trainers.lm.corpus import Corpus
from effpass.trainers.lm.pictures import ROOM, make_picture
from effpass.trainers.lm.pictures_input import PictureInput
from effpass.trainers.lm.tasks import make_example, shortest
from effpass.trainers.lm.tokenizer import END, PAD, byte_ids

__all__ = ["MicroBatches", "evaluation_batches", "most_pictures", "source_names"]

# Maximum number of questions about one context in training.
_QUESTIONS = 32
# Number of tokens of each source in an evaluation, if these are 8 to 64 sequences.
_EVALUATION_TOKENS = 1 << 18
_EVALUATION_KEY = 1


def source_names(config: Config) -> list[str]:
    """Return a name for each source: that of its task or pictures, or `text`; equal names are numbered."""
    plain = [source.task or source.pictures or "text" for source in config.data]
    return [name if plain.count(name) == 1 else f"{name}{plain[:i].count(name) + 1}" for i, name in enumerate(plain)]


@dataclass(frozen=True)
class _Sequence:
    """Token ids `[T]`, their weights, float32 `[T]`, and the pictures, uint8 `[H, W, 3]`, that stand among them."""

    tokens: np.ndarray
    weights: np.ndarray
    pictures: tuple[np.ndarray, ...] = ()


class MicroBatches(Dataset[dict[str, torch.Tensor]]):
    """Micro-batches of a run, in order.

    Args:
        config: config of the run.
        corpora: text of each source, by the index of the source.
        rank: index of this process.
        world: number of processes, each of which runs its share of the batch of every step.
        pictures: how the model reads pictures; required if a source has pictures.

    Raises:
        EffpassError: if a batch can't be divided among processes and micro-batches, or if a text is shorter than a
            sequence.
    """

    def __init__(
        self,
        config: Config,
        corpora: dict[int, Corpus],
        rank: int = 0,
        world: int = 1,
        pictures: PictureInput | None = None,
    ) -> None:
        self.config = config
        self.corpora = corpora
        self.pictures = pictures
        self.rank, self.world = rank, world
        for stage in config.stages:
            _check(stage, corpora, world)
        # For each sequence of a stage: its source, and its number among the sequences of that source in the stage.
        self._sources, self._numbers = [], []
        for index in range(len(config.stages)):
            drawn = _drawn_sources(config, index)
            numbers = np.empty(len(drawn), dtype=np.int64)
            for source in range(len(config.data)):
                numbers[drawn == source] = np.arange(np.count_nonzero(drawn == source))
            self._sources.append(drawn)
            self._numbers.append(numbers)

    def __len__(self) -> int:
        return self.config.steps * self.config.accumulate

    def stage_of(self, step: int) -> tuple[int, int]:
        """Return the stage of an optimizer step, and the number of the step in that stage."""
        for index, stage in enumerate(self.config.stages):
            if step < stage.steps:
                return index, step
            step -= stage.steps
        raise IndexError(step)

    def __getitem__(self, micro: int) -> dict[str, torch.Tensor]:
        """Return micro-batch number `micro` of this process.

        Returns:
            ``input_ids``, int64 `[B, T]`; ``weights``, float32 `[B, T]`, the weight of predicting each token from those
            before it; ``source``, int64 `[B]`; and, if there are pictures, ``pixels``, uint8 `[N, H, W, 3]`, in their
            order.
        """
        step, part = divmod(micro, self.config.accumulate)
        index, step = self.stage_of(step)
        stage = self.config.stages[index]
        size = stage.batch // (stage.accumulate * self.world)
        first = step * stage.batch + (part * self.world + self.rank) * size
        rows = range(first, first + size)
        sources = self._sources[index][first : first + size]
        return _stack([self._sequence(index, row, stage.sequence_length) for row in rows], sources)

    def _sequence(self, stage: int, row: int, length: int) -> _Sequence:
        number = int(self._sources[stage][row])
        key = (self.config.seed, stage, number)
        index, source = int(self._numbers[stage][row]), self.config.data[number]
        if number in self.corpora:
            return _graded_whole(self.corpora[number].sequence(index, length, key))
        rng = np.random.default_rng((*key, index))
        if source.pictures is not None:
            assert self.pictures is not None
            return _picture_sequence(source.pictures, rng, length, self.pictures)
        return _task_sequence(source, rng, length)


def most_pictures(config: Config, index: int, world: int, pictures: PictureInput | None) -> int:
    """Return the largest number of pictures in a micro-batch of stage `index`."""
    if pictures is None:
        return 0
    stage = config.stages[index]
    has_pictures = np.array([source.pictures is not None for source in config.data])[_drawn_sources(config, index)]
    rows = has_pictures.reshape(-1, stage.batch // (stage.accumulate * world)).sum(1).max()
    return int(rows) * _pictures_of(stage.sequence_length, pictures)


def evaluation_batches(
    config: Config, corpora: dict[int, Corpus], stage: Stage, pictures: PictureInput | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield held-out sequences of each source, one source per batch, with one question per context or picture."""
    length = stage.sequence_length
    size = max(1, stage.batch // stage.accumulate)
    count = min(64, max(8, _EVALUATION_TOKENS // length))
    for number, source in enumerate(config.data):
        if number in corpora:
            kept = corpora[number].held_out
            rows = [_graded_whole(kept[i * length : (i + 1) * length]) for i in range(min(count, len(kept) // length))]
        else:
            rngs = [np.random.default_rng((config.seed, _EVALUATION_KEY, number, i, length)) for i in range(count)]
            if source.pictures is not None:
                assert pictures is not None
                rows = [_picture_sequence(source.pictures, rng, length, pictures, questions=1) for rng in rngs]
            else:
                rows = [_task_sequence(source, rng, length, questions=1, is_packed=False) for rng in rngs]
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            yield _stack(part, np.full(len(part), number))


def _check(stage: Stage, corpora: dict[int, Corpus], world: int) -> None:
    """Raise EffpassError if the batches or sequences of a stage can't be formed."""
    if stage.batch % (stage.accumulate * world):
        raise EffpassError(
            f"a batch of {stage.batch} sequences can't be shared by {world} processes with {stage.accumulate}"
            " micro-batches each",
            hint="make 'batch' a multiple of the processes times 'accumulate'",
        )
    for number, corpus in corpora.items():
        for name, tokens in (("to train on", corpus.training), ("held out", corpus.held_out)):
            if len(tokens) < stage.sequence_length and (len(tokens) or name == "to train on"):
                raise EffpassError(
                    f"data[{number}]: {len(tokens)} tokens {name}, and a stage has sequences of"
                    f" {stage.sequence_length}",
                    hint="give more text, a larger held_out, or shorter sequences",
                )


def _drawn_sources(config: Config, index: int) -> np.ndarray:
    """Return the source of each sequence of a stage: int16 `[steps * batch]`."""
    weights = np.array([source.weight for source in config.data])
    count = config.stages[index].steps * config.stages[index].batch
    rng = np.random.default_rng((config.seed, index))
    return rng.choice(len(weights), size=count, p=weights / weights.sum()).astype(np.int16)


def _graded_whole(tokens: np.ndarray) -> _Sequence:
    """Return a sequence in which all tokens but the first have equal weight."""
    weights = np.full(len(tokens), 1 / (len(tokens) - 1), dtype=np.float32)
    weights[0] = 0
    return _Sequence(tokens, weights)


def _task_sequence(
    source: Source, rng: np.random.Generator, length: int, *, questions: int = _QUESTIONS, is_packed: bool = True
) -> _Sequence:
    """Return a sequence of `length` tokens that consists of examples of a task, each followed by an end token.

    If packed, a sequence holds one example of the full length or, equally often, several of random lengths. Short
    examples are learned earlier and have more answers to learn from.
    """
    assert source.task is not None
    least = shortest(source.task, source.options) + 1
    lengths = [length]
    if is_packed and rng.random() < 0.5:
        lengths, left = [], length
        while left:
            wanted = int(np.exp(rng.uniform(np.log(least), np.log(length))))
            lengths.append(left if left - wanted < least else wanted)
            left -= lengths[-1]
    tokens = np.empty(length, dtype=np.uint16)
    graded = np.zeros(length, dtype=np.float32)
    at = 0
    for size in lengths:
        example = make_example(source.task, rng, size - 1, questions, source.options)
        tokens[at : at + size - 1] = byte_ids(example.text)
        tokens[at + size - 1] = END
        place = at + len(example.context)
        for question, answer in example.pairs:
            place += len(question)
            graded[place : place + len(answer)] = 1
            place += len(answer)
        at += size
    return _Sequence(tokens, graded / graded.sum())


def _pictures_of(length: int, pictures: PictureInput) -> int:
    """Return the number of pictures that fit into a sequence of `length` tokens with their text."""
    return length // (pictures.tokens + ROOM)


def _picture_sequence(
    kind: str, rng: np.random.Generator, length: int, pictures: PictureInput, *, questions: int | None = None
) -> _Sequence:
    """Return a sequence of `length` tokens in equal parts, each with a picture, its questions and padding.

    Args:
        kind: kind of the questions.
        rng: generator whose state determines the pictures.
        length: number of tokens.
        pictures: how the model reads pictures.
        questions: maximum number of questions about a single picture; None for as many pictures and questions as fit.
    """
    count = _pictures_of(length, pictures) if questions is None else 1
    tokens = np.full(length, PAD, dtype=np.uint16)
    graded = np.zeros(length, dtype=np.float32)
    drawn = [make_picture(kind, rng, pictures.size) for _ in range(count)]
    for number, picture in enumerate(drawn):
        at, end = number * (length // count), (number + 1) * (length // count)
        tokens[at : at + pictures.tokens] = pictures.token
        at += pictures.tokens
        for question, answer in picture.pairs[:questions]:
            middle, last = at + len(question), at + len(question) + len(answer)
            if last >= end:
                break
            tokens[at:last] = byte_ids(question + answer)
            tokens[last] = END
            graded[middle : last + 1] = 1
            at = last + 1
    return _Sequence(tokens, graded / graded.sum(), tuple(picture.pixels for picture in drawn))


def _stack(rows: list[_Sequence], sources: np.ndarray) -> dict[str, torch.Tensor]:
    batch = {
        "input_ids": torch.from_numpy(np.stack([row.tokens for row in rows]).astype(np.int64)),
        "weights": torch.from_numpy(np.stack([row.weights for row in rows])),
        "source": torch.from_numpy(sources.astype(np.int64)),
    }
    pixels = [picture for row in rows for picture in row.pictures]
    return {**batch, "pixels": torch.from_numpy(np.stack(pixels))} if pixels else batch
