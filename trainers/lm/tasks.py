"""Synthetic retrieval tasks of any length in bytes, with known answers, to train and measure the use of long contexts.

There are four kinds, which are common for long-context models (RULER, arXiv 2404.06654): finding a needle among others,
following chains of variables, aggregation, and copying. An example consists of a context, questions about it, and their
answers::

    … it was made code kqzt is 4821. of many … most code kqzt is 4821
    └───────────────── context ──────────────────┘└ question ─┘└answer┘

Only answers are graded, that is, count in the loss. The rest of a context is random; its loss would be noise with a
lower bound that no model can beat, over most of the tokens. Examples for training ask many questions about one context,
with which retrieval is learned in few steps; examples for evaluation ask one.

Examples are plain ASCII and determined by the state of the random generator.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from effpass.core.errors import EffpassError, did_you_mean

__all__ = ["MIN_LENGTH", "TASKS", "Example", "make_example", "shortest", "task_faults"]

# Number of bytes of the shortest example of any task: context, one question and its answer.
MIN_LENGTH = 48

# Without "is", which is part of statements.
_WORDS = """
    the of and a to in was that it for on are with as his they at be this from have or by one had not but what
    all were when we there can an your which their said if do will each about how up out them then she many some so
    these would other into has more her two like him see time could no make than first been its who now people my
    made over did down only way find use may water long little very after words called just where most know
"""
_FILLER = np.array([f" {word}".encode() for word in _WORDS.split()], dtype=object)
_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype=np.uint8)
_NAME = 4  # letters of a name, of which there are 456,976


@dataclass(frozen=True)
class Example:
    """A context with questions.

    Attributes:
        context: context in ASCII.
        pairs: questions and answers, each of which follows the context and the pairs before it.
        chance: accuracy of guessing with knowledge of the values in the context but not of the question, from 0 to 1.
    """

    context: bytes
    pairs: list[tuple[bytes, bytes]]
    chance: float

    @property
    def text(self) -> bytes:
        """Context, questions and answers."""
        return self.context + b"".join(question + answer for question, answer in self.pairs)


def make_example(
    task: str, rng: np.random.Generator, length: int, questions: int, options: Mapping[str, int]
) -> Example:
    """Return an example of exactly `length` bytes with at most `questions` questions.

    Args:
        task: name of the task, a key of :data:`TASKS`.
        rng: generator whose state determines the example.
        length: number of bytes of context, questions and answers together.
        questions: wanted number of questions; there are fewer if they would take more than a third of the length.
        options: options of the task that differ from its defaults.

    Raises:
        EffpassError: if `length` is too small for the task.
    """
    try:
        example = TASKS[task](rng, length, questions, **options)
        fits = len(example.text) == length
    except ValueError:  # the number of things to draw is negative
        fits = False
    if not fits:
        raise EffpassError(f"{length} bytes are too few for an example of {task} with options {dict(options)}")
    return example


@cache
def _shortest(task: str, options: tuple[tuple[str, int], ...]) -> int:
    length = MIN_LENGTH
    while True:
        with suppress(EffpassError):
            make_example(task, np.random.default_rng(0), length, 1, dict(options))
            return length
        length += 16


def shortest(task: str, options: Mapping[str, int]) -> int:
    """Return the number of bytes of the shortest example of a task, in steps of 16."""
    return _shortest(task, tuple(sorted(options.items())))


def task_faults(task: str, options: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the options of a task; empty if they are valid."""
    parameters = inspect.signature(TASKS[task]).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    faults = [f"{name}: unknown option{did_you_mean(name, known)}" for name in options if name not in known]
    for name, value in options.items():
        least = _LEAST.get(name, 1)
        if name in known and (type(value) is not int or not least <= value <= _MOST):
            faults.append(f"{name}: got {value!r}, expected a whole number from {least} to {_MOST}")
    return faults


# -- the tasks -----------------------------------------------------------------------------------------------------


def needle(rng: np.random.Generator, length: int, questions: int, *, keys: int = 16) -> Example:
    """Multi-key needle retrieval: `keys` names with a code each are hidden in filler; asks for the code of a name."""
    count = _at_most(keys, b" code kqzt is 4821.", length)
    names, codes = _names(rng, count), _numbers(rng, count)
    statements = [b" code %b is %b." % pair for pair in zip(names, codes, strict=True)]
    asked = rng.permutation(count)[: _at_most(questions, statements[0], length)]
    pairs = [(b" code %b is" % names[i], b" " + codes[i]) for i in asked]
    return _fill(rng, length, statements, pairs, 1 / count)


def variables(rng: np.random.Generator, length: int, questions: int, *, chains: int = 8, hops: int = 2) -> Example:
    """Variable tracking: `chains` of assignments, each of which passes a number on over `hops` names.

    At most one question refers to a chain, so that no answer can be copied from an earlier one. The first question asks
    for the end of its chain, the others for any of its names.
    """
    chains = _at_most(chains, b" kqzt is mnop." * (hops + 1), length)
    names = _names(rng, chains * (hops + 1)).reshape(chains, hops + 1)
    values = _numbers(rng, chains)
    statements = [
        [b" %b is %b." % pair for pair in zip(row, [value, *row[:-1]], strict=True)]
        for row, value in zip(names, values, strict=True)
    ]
    asked = rng.permutation(chains)[: _at_most(questions, b" value of kqzt: 4821", length)]
    depths = [hops, *rng.integers(hops + 1, size=len(asked) - 1)]
    pairs = [(b" value of %b:" % names[i, j], b" " + values[i]) for i, j in zip(asked, depths, strict=True)]
    # Chains are interleaved, but each keeps its order, so that a name is assigned before it is used.
    turns = rng.permutation(np.repeat(np.arange(chains), hops + 1))
    return _fill(rng, length, [statements[i].pop(0) for i in turns], pairs, 1 / chains)


def frequent(rng: np.random.Generator, length: int, questions: int, *, words: int = 8) -> Example:
    """Aggregation: asks for the most frequent of `words` words, which occurs about twice as often as each other one."""
    del questions  # there is always one question
    question = b". The most frequent is"
    names = _names(rng, words)
    count = (length - len(question) - 2 * (1 + _NAME)) // (1 + _NAME)
    shares = np.where(np.arange(words) == 0, 2, 1) / (words + 1)
    counts = rng.multinomial(count, shares)
    while counts[0] <= counts[1:].max():  # no word is the most frequent yet: replace some of the others
        counts[1 + counts[1:].argmax()] -= 1
        counts[0] += 1
    listed = b" " + b" ".join(rng.permutation(np.repeat(names, counts)))
    answer = b" " + names[0]
    context = b"." * (length - len(listed) - len(question) - len(answer)) + listed
    return Example(context, [(question, answer)], 1 / words)


def copy(rng: np.random.Generator, length: int, questions: int, *, letters: int = 8) -> Example:
    """Induction: a question repeats six letters of a random text and asks for the `letters` letters after them."""
    cue = 6
    size = len(b" After ") + cue + letters
    asked = _at_most(questions, b"?" * size, length)
    text = rng.choice(_LETTERS, size=length - asked * size).tobytes()
    starts = rng.integers(len(text) - cue - letters + 1, size=asked)
    pairs = [(b" After " + text[s : s + cue], text[s + cue : s + cue + letters]) for s in starts]
    return Example(text, pairs, math.pow(26, -letters))


TASKS: dict[str, Callable[..., Example]] = {
    "needle": needle,
    "variables": variables,
    "frequent": frequent,
    "copy": copy,
}
_LEAST = {"words": 2, "hops": 0}
_MOST = 4096


# -- parts ---------------------------------------------------------------------------------------------------------


def _at_most(wanted: int, piece: bytes, length: int) -> int:
    """Return how many pieces fit into a third of `length`, at least 1 and at most `wanted`."""
    return max(1, min(wanted, length // 3 // len(piece)))


def _names(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return `count` different names of lower-case letters."""
    codes = rng.choice(26**_NAME, size=count, replace=False, shuffle=True)
    letters = _LETTERS[codes[:, None] // 26 ** np.arange(_NAME) % 26]
    return np.array([row.tobytes() for row in letters], dtype=object)


def _numbers(rng: np.random.Generator, count: int) -> list[bytes]:
    """Return `count` different numbers of four digits."""
    return [b"%d" % number for number in rng.choice(9000, size=count, replace=False) + 1000]


def _fill(
    rng: np.random.Generator, length: int, statements: list[bytes], pairs: list[tuple[bytes, bytes]], chance: float
) -> Example:
    """Return an example with the statements, in order, at random positions of filler text, followed by the pairs."""
    room = length - sum(map(len, statements)) - sum(len(question) + len(answer) for question, answer in pairs) - 1
    drawn = rng.integers(len(_FILLER), size=room // 2 + 1)  # the shortest word has two bytes, including its space
    filler = b"".join(_FILLER[drawn])[:room]
    gaps = np.flatnonzero(np.frombuffer(filler, dtype=np.uint8) == ord(" "))
    places = np.sort(rng.choice(gaps, size=len(statements)))
    pieces, at = [], 0
    for place, statement in zip(places, statements, strict=True):
        pieces += [filler[at:place], statement]
        at = place
    return Example(b"".join([*pieces, filler[at:], b"."]), pairs, chance)
