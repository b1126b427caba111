"""Rendered pictures: what is asked and told of them is what their pixels show."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from effpass.trainers.lm.pictures import MIN_SIZE, PICTURES, ROOM, Picture, make_picture
from effpass.trainers.lm.pictures_drawing import COLOURS, SHAPES, shape_mask, text_mask

SIZES = (MIN_SIZE, 112, 224)
QUESTIONS = [kind for kind in PICTURES if kind != "caption"]


def picture(kind: str, seed: int, size: int = 112) -> Picture:
    return make_picture(kind, np.random.default_rng(seed), size)


def first(kind: str, seed: int) -> tuple[str, str]:
    question, answer = picture(kind, seed, MIN_SIZE).pairs[0]
    return question.decode(), answer.decode()


# -- reading a picture back -----------------------------------------------------------------------------------------


@dataclass
class Seen:
    """A region of one tint: its mask, cut to its bounds, and the colour nearest to it."""

    mask: np.ndarray
    colour: str
    top: int
    left: int

    def cell(self, size: float) -> tuple[int, int]:
        """Row and column of its centre in a grid of cells of `size` pixels."""
        height, width = self.mask.shape
        return int((self.top + height / 2) // size), int((self.left + width / 2) // size)

    def is_shape(self, shape: str) -> bool:
        largest = round(1.25 * max(self.mask.shape)) + 3  # a square fills 0.85 of its size
        return any(np.array_equal(self.mask, trimmed(shape_mask(shape, size))) for size in range(4, largest))

    def is_text(self, text: str) -> bool:
        return any(np.array_equal(self.mask, trimmed(text_mask(text, scale))) for scale in range(1, 16))


def trimmed(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def seen_in(pixels: np.ndarray) -> list[Seen]:
    """Everything of a picture: no two things have the same tint, and grey is the ground."""
    found = []
    for tint in np.unique(pixels.reshape(-1, 3), axis=0):
        if np.ptp(tint) == 0:
            continue
        mask = (pixels == tint).all(2)
        distances = {name: np.abs(np.array(rgb) - tint).max() for name, rgb in COLOURS.items()}
        name = min(distances, key=distances.__getitem__)
        assert distances[name] <= 10
        found.append(Seen(trimmed(mask), name, int(mask.any(1).argmax()), int(mask.any(0).argmax())))
    return found


def test_shapes_and_characters_can_be_told_apart():
    for size in (8, 12, 40):
        assert len({shape_mask(shape, size).tobytes() for shape in SHAPES}) == len(SHAPES)
    characters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    glyphs = np.stack([text_mask(character, 1) for character in characters])
    assert glyphs.shape == (36, 7, 5)
    differing = (glyphs[:, None] != glyphs[None]).sum((2, 3)) + 35 * np.eye(36, dtype=int)
    assert differing.min() >= 3
    assert np.array_equal(text_mask("A7", 3)[::3, ::3], text_mask("A7", 1))


@pytest.mark.parametrize("size", SIZES)
def test_the_only_thing_is_what_it_is_called(size):
    for seed in range(12):
        drawn = picture("thing", seed, size)
        (seen,) = seen_in(drawn.pixels)
        ((question, answer),) = drawn.pairs
        article, *words = answer.decode().split()
        assert question == b"What is this?"
        if article == "a":
            assert words == [seen.colour, words[1]]
            assert seen.is_shape(words[1])
        else:
            assert words == [words[0], words[1], "in", seen.colour]
            assert seen.is_text(words[1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_counts_are_those_of_the_picture(seed, size):
    drawn = picture("count", seed, size)
    seen = seen_in(drawn.pixels)
    for question, answer in drawn.pairs:
        shape = question.decode().removeprefix("How many ").removesuffix(" are there?")
        shape = "cross" if shape == "crosses" else shape.removesuffix("s")
        assert sum(thing.is_shape(shape) for thing in seen) == int(answer)
    assert sum(int(answer) for _, answer in drawn.pairs) == len(seen)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_colours_are_those_of_the_one_shape(seed, size):
    drawn = picture("colour", seed, size)
    seen = seen_in(drawn.pixels)
    assert len(drawn.pairs) == len(seen) >= 2
    for question, answer in drawn.pairs:
        shape = question.decode().removeprefix("What colour is the ").removesuffix("?")
        (thing,) = [thing for thing in seen if thing.is_shape(shape)]
        assert f" {thing.colour}" == answer.decode()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_left_stands_next_in_the_same_row(seed, size):
    drawn = picture("left", seed, size)
    seen, cell = seen_in(drawn.pixels), size / 3
    assert drawn.pairs

    def one(words: str) -> Seen:
        colour, shape = words.split()
        (thing,) = [thing for thing in seen if thing.colour == colour and thing.is_shape(shape)]
        return thing

    for question, answer in drawn.pairs:
        right = one(question.decode().removeprefix("What is left of the ").removesuffix("?"))
        near = one(answer.decode())
        row, column = right.cell(cell)
        assert near.cell(cell) == (row, column - 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["digit", "word"])
def test_texts_are_those_of_their_colour(kind, size):
    for seed in range(6):
        drawn = picture(kind, seed, size)
        seen = seen_in(drawn.pixels)
        for question, answer in drawn.pairs:
            (colour,) = set(question.decode().strip("?").split()) & set(COLOURS)
            told = answer.decode().strip()
            assert len(told) == {"digit": 1, "word": 3}[kind]
            # The whole text lies in the picture, and no other of its colour.
            texts = [thing for thing in seen if thing.colour == colour and not any(map(thing.is_shape, SHAPES))]
            assert [thing.is_text(told) for thing in texts] == [True]


@pytest.mark.parametrize("size", SIZES)
def test_captions_tell_everything_row_by_row(size):
    for seed in range(12):
        drawn = picture("caption", seed, size)
        seen, cell = seen_in(drawn.pixels), size / 3
        ((question, answer),) = drawn.pairs
        phrases = answer.decode().strip(" .").replace(" and ", ", ").split(", ")
        assert question == b"Describe the picture."
        assert len(phrases) == len(seen)
        places = []
        for phrase in phrases:
            first_word, *words = phrase.split()
            if first_word == "a":
                large, colour, shape, *place = words
                (thing,) = [t for t in seen if t.colour == colour and t.is_shape(shape) and in_place(t, place, cell)]
                assert (max(thing.mask.shape) > 0.62 * cell) == (large == "large")
            else:
                _, text, _, colour, *place = words
                (thing,) = [t for t in seen if t.colour == colour and t.is_text(text) and in_place(t, place, cell)]
            places.append(thing.cell(cell))
        assert places == sorted(places)


def in_place(thing: Seen, words: list[str], cell: float) -> bool:
    row = {"top": 0, "bottom": 2}.get(next((w for w in words if w in ("top", "bottom")), ""), 1)
    column = {"left": 0, "right": 2}.get(words[-1], 1)
    return thing.cell(cell) == (row, column)


# -- as examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_are_a_function_of_the_seed(kind):
    one, same, other = (picture(kind, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.pixels, same.pixels)
    assert one.pairs == same.pairs
    assert not np.array_equal(one.pixels, other.pixels)
    assert (one.pixels.shape, one.pixels.dtype) == ((112, 112, 3), np.uint8)


@pytest.mark.parametrize("kind", PICTURES)
def test_every_question_with_its_answer_has_room(kind):
    longest = max(
        len(question) + len(answer) + 1
        for seed in range(400)
        for question, answer in picture(kind, seed, MIN_SIZE).pairs
    )
    assert longest <= ROOM
    if kind == "caption":
        assert longest > 0.75 * ROOM


@pytest.mark.parametrize("kind", QUESTIONS)
def test_chance_is_what_the_best_blind_guess_reaches(kind):
    count = 1200
    answers = Counter(first(kind, seed)[1] for seed in range(count))
    chance, best = picture(kind, 0).chance, answers.most_common(1)[0][1] / count
    # The most frequent of up to ten answers stands up to three deviations above what each is drawn with.
    assert best <= chance + 3 * np.sqrt(chance / count) + 2 / count
    if chance > 0.01 and kind != "thing":  # whose answers are not alike
        assert best >= chance
        assert len(answers) == round(1 / chance) + (kind == "left")


def test_a_question_is_never_answered_by_itself():
    """The same question has different answers in different pictures."""
    for kind in QUESTIONS:
        by_question: dict[str, set[str]] = {}
        for seed in range(300):
            question, answer = first(kind, seed)
            by_question.setdefault(question, set()).add(answer)
        common = [answers for answers in by_question.values() if len(answers) > 1]
        assert len(common) > 0.8 * len(by_question), kind
