"""Micro-batches as a pure function of their number: however a run is cut or interrupted, it reads the same data.

Which source a sequence comes from is drawn once for the whole run. A sequence is then the source's next: of text by the
corpus's own order, of a task by a generator seeded with the sequence's number.

Each token has a *weight* in the loss, and the weights of a sequence sum to 1, so that a sequence of a task, with few
graded tokens, counts as much as one of text, where every token is graded. The loss of a batch is the mean over its
sequences, which makes it the same however the batch is cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from effpass.core.errors import EffpassError
from effpass.trainers.lm.config import Config, Source, Stage
from effpass.trainers.lm.corpus import Corpus
from effpass.trainers.lm.tasks import make_example, shortest
from effpass.trainers.lm.tokenizer import END, byte_ids

__all__ = ["MicroBatches", "evaluation_batches", "make_loader", "source_names"]

# Questions about one context in training.
_QUESTIONS = 32
# Tokens of each source in an evaluation, within 8 to 64 sequences.
_EVALUATION_TOKENS = 1 << 18
_EVALUATION_KEY = 1


def source_names(config: Config) -> list[str]:
    """A name for each source: the task's, or `text`, with a number where there are several."""
    plain = [source.task or "text" for source in config.data]
    return [name if plain.count(name) == 1 else f"{name}{plain[:i].count(name) + 1}" for i, name in enumerate(plain)]


class MicroBatches(Dataset[dict[str, torch.Tensor]]):
    """The run's micro-batches, in order.

    Args:
        config: of the run.
        corpora: source number → its text.
        rank: this process.
        world: processes; each runs its share of every step's batch.

    Raises:
        EffpassError: a batch can't be shared out, or a text is shorter than a sequence.
    """

    def __init__(self, config: Config, corpora: dict[int, Corpus], rank: int = 0, world: int = 1) -> None:
        self.config = config
        self.corpora = corpora
        self.rank, self.world = rank, world
        for stage in config.stages:
            _check(stage, corpora, world)
        counts = [stage.steps * stage.batch for stage in config.stages]
        weights = np.array([source.weight for source in config.data])
        # A stage's sequences: their source, and their number among the source's sequences in the stage.
        self._sources, self._numbers = [], []
        for index, count in enumerate(counts):
            rng = np.random.default_rng((config.seed, index))
            drawn = rng.choice(len(weights), size=count, p=weights / weights.sum()).astype(np.int16)
            numbers = np.empty(count, dtype=np.int64)
            for source in range(len(weights)):
                numbers[drawn == source] = np.arange(np.count_nonzero(drawn == source))
            self._sources.append(drawn)
            self._numbers.append(numbers)

    def __len__(self) -> int:
        return self.config.steps * self.config.accumulate

    def stage_of(self, step: int) -> tuple[int, int]:
        """The stage that an optimiser step belongs to, and the step's number in it."""
        for index, stage in enumerate(self.config.stages):
            if step < stage.steps:
                return index, step
            step -= stage.steps
        raise IndexError(step)

    def __getitem__(self, micro: int) -> dict[str, torch.Tensor]:
        """Micro-batch number `micro` of this process.

        Returns:
            ``input_ids`` int64 `[B, T]`; ``weights`` float32 `[B, T]`, of predicting each token from those before;
            ``source`` int64 `[B]`.
        """
        step, part = divmod(micro, self.config.accumulate)
        index, step = self.stage_of(step)
        stage = self.config.stages[index]
        size = stage.batch // (stage.accumulate * self.world)
        first = step * stage.batch + (part * self.world + self.rank) * size
        rows = range(first, first + size)
        sources = self._sources[index][first : first + size]
        return _stack([self._sequence(index, row, stage.sequence_length) for row in rows], sources)

    def _sequence(self, stage: int, row: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        number = int(self._sources[stage][row])
        key = (self.config.seed, stage, number)
        index, source = int(self._numbers[stage][row]), self.config.data[number]
        if number in self.corpora:
            return _graded_whole(self.corpora[number].sequence(index, length, key))
        return _task_sequence(source, np.random.default_rng((*key, index)), length)


def make_loader(batches: MicroBatches, first: int, workers: int, pin: bool) -> DataLoader[Any]:
    """A loader of the micro-batches from number `first` on; `workers` processes change nothing in what it gives."""
    return DataLoader(
        batches,
        batch_size=None,
        sampler=_From(first, len(batches)),
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        # `fork` shares the corpora and starts at once; nothing in a worker touches a GPU.
        multiprocessing_context="fork" if workers else None,
    )


def evaluation_batches(config: Config, corpora: dict[int, Corpus], stage: Stage) -> Iterator[dict[str, torch.Tensor]]:
    """Held-out sequences of each source, with one source in a batch; tasks ask one question about each context."""
    length = stage.sequence_length
    size = max(1, stage.batch // stage.accumulate)
    count = min(64, max(8, _EVALUATION_TOKENS // length))
    for number, source in enumerate(config.data):
        if number in corpora:
            kept = corpora[number].held_out
            rows = [_graded_whole(kept[i * length : (i + 1) * length]) for i in range(min(count, len(kept) // length))]
        else:
            rngs = [np.random.default_rng((config.seed, _EVALUATION_KEY, number, i, length)) for i in range(count)]
            rows = [_task_sequence(source, rng, length, questions=1, is_packed=False) for rng in rngs]
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            yield _stack(part, np.full(len(part), number))


class _From(Sampler[int]):
    """The numbers from `first` on. The length is that of all, since the Trainer takes it for that of an epoch."""

    def __init__(self, first: int, total: int) -> None:
        self.first, self.total = first, total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.total))

    def __len__(self) -> int:
        return self.total


def _check(stage: Stage, corpora: dict[int, Corpus], world: int) -> None:
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


def _graded_whole(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weights = np.full(len(tokens), 1 / (len(tokens) - 1), dtype=np.float32)
    weights[0] = 0
    return tokens, weights


def _task_sequence(
    source: Source, rng: np.random.Generator, length: int, *, questions: int = _QUESTIONS, is_packed: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Examples of a task, each with an end token behind, that fill `length` tokens.

    One example of the whole length, or as often several of all lengths: short ones are learned first, and have more
    answers to learn from.
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
    return tokens, graded / graded.sum()


def _stack(rows: list[tuple[np.ndarray, np.ndarray]], sources: np.ndarray) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.from_numpy(np.stack([tokens for tokens, _ in rows]).astype(np.int64)),
        "weights": torch.from_numpy(np.stack([weights for _, weights in rows])),
        "source": torch.from_numpy(sources.astype(np.int64)),
    }
