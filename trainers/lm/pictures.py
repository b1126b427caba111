"""Rendered pictures with questions and known answers, as training data for vision-language models.

A picture is a grid of cells, some of which contain a shape, a digit or a word of three letters. Each has a single
colour, a random position in its cell, and a random size. An example is a picture and questions about it::

    [picture] What colour is the star? red<end>What colour is the moon? cyan<end>
              └────── question ───────┘└answer┘

Only the answers and the end token after each answer are graded, that is, count in the loss. The chance level of a
question is the accuracy of the best guess without seeing the picture. All data is determined by the state of the random
generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from effpass.trainers.lm.pictures_drawing import COLOURS, SHAPES, draw, shape_mask, text_mask, text_scale

__all__ = ["MIN_SIZE", "PICTURES", "ROOM", "Picture", "make_picture"]

# Number of bytes of the longest caption with its question and end token; all other pairs are shorter.
ROOM = 224
# Smallest size in pixels of a picture in which words can be read.
MIN_SIZE = 56

_NAMES = list(COLOURS)
_PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("at the left", "in the middle", "at the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
_LETTERS = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
_WORD = 3
_MOST_COUNTED = 8


@dataclass(frozen=True)
class Picture:
    """A picture with questions.

    Attributes:
        pixels: RGB values, uint8 `[size, size, 3]`.
        pairs: questions and answers in ASCII; an end token belongs after each answer.
        chance: chance level of the first question, from 0 to 1; 0 for a caption.
    """

    pixels: np.ndarray
    pairs: list[tuple[bytes, bytes]]
    chance: float


@dataclass(frozen=True)
class _Thing:
    """Content of a cell: a shape, or a text if `text` is not empty; it fills the share `scale` of the cell's side."""

    shape: str
    colour: str
    row: int
    column: int
    scale: float
    text: str = ""


def make_picture(kind: str, rng: np.random.Generator, size: int) -> Picture:
    """Return a picture with `size` x `size` pixels and all questions of a kind that it answers.

    Args:
        kind: kind of questions, a key of :data:`PICTURES`.
        rng: generator whose state determines the picture.
        size: side length in pixels, at least :data:`MIN_SIZE`.
    """
    grid, things, pairs, chance = PICTURES[kind](rng)
    return Picture(_render(rng, size, grid, things), [(q.encode(), a.encode()) for q, a in pairs], chance)


# -- kinds ---------------------------------------------------------------------------------------------------------

_Scene = tuple[int, list[_Thing], list[tuple[str, str]], float]


def thing(rng: np.random.Generator) -> _Scene:
    """Ask what the only object is: a shape with its colour, a digit or a word; small, or as large as the picture."""
    grid, drawn = int(rng.integers(1, 4)), rng.random()
    ((row, column),) = _cells(rng, grid, 1)
    if drawn < 0.7:
        shown = _shape(rng, row, column)
        answer = f"a {shown.colour} {shown.shape}"
    else:
        kind = "digit" if drawn < 0.85 else "word"
        shown = _text(rng, row, column, kind, _colour(rng))
        answer = f"the {kind} {shown.text} in {shown.colour}"
    return grid, [shown], [("What is this?", f" {answer}")], 0.7 / (len(_NAMES) * len(SHAPES))


def caption(rng: np.random.Generator) -> _Scene:
    """Ask for a description of all objects, row by row: colour, kind and position, and of shapes the size."""
    cells = _cells(rng, 3, int(rng.integers(1, 5)))
    things, phrases = [], []
    for row, column in cells:
        place, drawn = _PLACES[row][column], rng.random()
        if drawn < 0.7:
            is_large = rng.random() < 0.5
            thing = _shape(rng, row, column, scale=rng.uniform(0.8, 0.95) if is_large else rng.uniform(0.4, 0.55))
            phrases.append(f"a {'large' if is_large else 'small'} {thing.colour} {thing.shape} {place}")
        else:
            kind = "digit" if drawn < 0.85 else "word"
            thing = _text(rng, row, column, kind, _colour(rng))
            phrases.append(f"the {kind} {thing.text} in {thing.colour} {place}")
        things.append(thing)
    answer = " and ".join(part for part in (", ".join(phrases[:-1]), phrases[-1]) if part)
    return 3, things, [("Describe the picture.", f" {answer}.")], 0.0


def count(rng: np.random.Generator) -> _Scene:
    """Ask how many shapes of a kind there are, of any colour: 1 to 8."""
    shapes = rng.permutation(SHAPES)[: rng.integers(2, 5)]
    numbers = [int(rng.integers(1, _MOST_COUNTED + 1))]
    for _ in shapes[1:]:
        left = 16 - sum(numbers) - (len(shapes) - 1 - len(numbers))
        numbers.append(int(rng.integers(1, min(_MOST_COUNTED, left) + 1)))
    cells = rng.permutation(16)[: sum(numbers)]
    listed = np.repeat(shapes, numbers)
    things = [_shape(rng, cell // 4, cell % 4, str(shape)) for cell, shape in zip(cells.tolist(), listed, strict=True)]
    pairs = [
        (f"How many {_plural(shape)} are there?", f" {number}") for shape, number in zip(shapes, numbers, strict=True)
    ]
    return 4, things, pairs, 1 / _MOST_COUNTED


def colour(rng: np.random.Generator) -> _Scene:
    """Ask for the colour of a shape; all shapes are of different kinds."""
    cells = _cells(rng, 3, int(rng.integers(2, 7)))
    shapes = rng.permutation(SHAPES)
    things = [_shape(rng, *cell, str(shape)) for cell, shape in zip(cells, shapes, strict=False)]
    asked = rng.permutation(len(things))
    pairs = [(f"What colour is the {things[i].shape}?", f" {things[i].colour}") for i in asked]
    return 3, things, pairs, 1 / len(COLOURS)


def left(rng: np.random.Generator) -> _Scene:
    """Ask for colour and kind of the shape directly to the left of another one, which is named by colour and kind."""
    row, column = rng.integers(3), rng.integers(2)
    cells = {(int(row), int(column)), (int(row), int(column) + 1)}  # at least one pair of neighbors
    cells |= set(_cells(rng, 3, int(rng.integers(1, 7))))
    drawn = rng.choice(len(_NAMES) * len(SHAPES), size=len(cells), replace=False)
    things = [
        _shape(rng, *cell, SHAPES[number % len(SHAPES)], _NAMES[number // len(SHAPES)])
        for cell, number in zip(sorted(cells), drawn, strict=True)
    ]
    pairs = [
        (f"What is left of the {right.colour} {right.shape}?", f" {near.colour} {near.shape}")
        for near, right in pairwise(things)
        if (near.row, near.column + 1) == (right.row, right.column)
    ]
    return 3, things, [pairs[i] for i in rng.permutation(len(pairs))], 1 / (len(_NAMES) * len(SHAPES) - 1)


def digit(rng: np.random.Generator) -> _Scene:
    """Ask which digit has a colour, among digits of other colours, and shapes of any colour."""
    return _texts(rng, "digit", 8, "Which digit is {}?", 1 / 10)


def word(rng: np.random.Generator) -> _Scene:
    """Ask for the three letters of the word in a colour, among words of other colours, and shapes of any colour."""
    return _texts(rng, "word", 6, "What is the {} word?", float(len(_LETTERS)) ** -_WORD)


PICTURES: dict[str, Callable[[np.random.Generator], _Scene]] = {
    "thing": thing,
    "caption": caption,
    "count": count,
    "colour": colour,
    "left": left,
    "digit": digit,
    "word": word,
}


# -- parts ---------------------------------------------------------------------------------------------------------


def _texts(rng: np.random.Generator, kind: str, most: int, question: str, chance: float) -> _Scene:
    grid = int(rng.integers(2, 4))
    asked = int(rng.integers(1, min(most, grid * grid) + 1))
    cells = rng.permutation(grid * grid)[: asked + rng.integers(grid)].tolist()
    colours = rng.permutation(_NAMES)
    things = [
        _text(rng, cell // grid, cell % grid, kind, str(colours[i]))
        if i < asked
        else _shape(rng, cell // grid, cell % grid)
        for i, cell in enumerate(cells)
    ]
    pairs = [(question.format(thing.colour), f" {thing.text}") for thing in things[:asked]]
    return grid, things, pairs, chance


def _shape(
    rng: np.random.Generator, row: int, column: int, shape: str = "", colour: str = "", scale: float = 0.0
) -> _Thing:
    """Return a shape; properties that are not given are drawn at random."""
    shape = shape or SHAPES[rng.integers(len(SHAPES))]
    return _Thing(shape, colour or _colour(rng), row, column, scale or rng.uniform(0.6, 0.95))


def _text(rng: np.random.Generator, row: int, column: int, kind: str, colour: str) -> _Thing:
    text = str(rng.integers(10)) if kind == "digit" else "".join(rng.choice(_LETTERS, size=_WORD))
    return _Thing("", colour, row, column, rng.uniform(0.6, 0.98), text)


def _colour(rng: np.random.Generator) -> str:
    return _NAMES[rng.integers(len(_NAMES))]


def _cells(rng: np.random.Generator, grid: int, count: int) -> list[tuple[int, int]]:
    """Return different random cells, row by row."""
    return [divmod(int(cell), grid) for cell in np.sort(rng.permutation(grid * grid)[:count])]


def _plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def _render(rng: np.random.Generator, size: int, grid: int, things: list[_Thing]) -> np.ndarray:
    """Render the picture: objects on a dark or a light background, each at a random position in its cell."""
    ground = rng.integers(0, 50) + (200 if rng.random() < 0.5 else 0)
    pixels = np.full((size, size, 3), ground, dtype=np.uint8)
    cell = size / grid
    shades = rng.integers(-10, 11, size=(len(things), 3))  # variation, so that a colour has no fixed RGB value
    places = rng.random((len(things), 2))
    for thing, shade, place in zip(things, shades, places, strict=True):
        room = int(cell * thing.scale)
        mask = text_mask(thing.text, text_scale(thing.text, room)) if thing.text else shape_mask(thing.shape, room)
        free = np.maximum(0, cell - np.array(mask.shape))
        top, left_ = (np.array([thing.row, thing.column]) * cell + place * free).astype(int)
        tint = np.clip(np.array(COLOURS[thing.colour]) + shade, 0, 255).astype(np.uint8)
        draw(pixels, mask, tint, top, left_)
    return pixels
