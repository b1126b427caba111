"""Shapes and text as masks of pixels, and their colours, from which :mod:`.pictures` renders its pictures."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

__all__ = ["COLOURS", "SHAPES", "draw", "shape_mask", "text_mask", "text_scale"]

COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 225),
    "yellow": (235, 210, 50),
    "purple": (140, 50, 185),
    "cyan": (60, 205, 215),
    "orange": (245, 135, 25),
    "pink": (245, 140, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "moon")

# Characters have five by seven pixels, with an empty column between two of them.
_WIDTH, _HEIGHT = 5, 7
_FONT = {
    "ABCDEFGHI": """
        .###. ####. .#### ###.. ##### ##### .#### #...# #####
        #...# #...# #.... #..#. #.... #.... #.... #...# ..#..
        #...# #...# #.... #...# #.... #.... #.... #...# ..#..
        ##### ####. #.... #...# ####. ####. #.### ##### ..#..
        #...# #...# #.... #...# #.... #.... #...# #...# ..#..
        #...# #...# #.... #..#. #.... #.... #...# #...# ..#..
        #...# ####. .#### ###.. ##### #.... .#### #...# #####
    """,
    "JKLMNOPQR": """
        ..### #...# #.... #...# #...# .###. ####. .###. ####.
        ...#. #..#. #.... ##.## ##..# #...# #...# #...# #...#
        ...#. #.#.. #.... #.#.# ##..# #...# #...# #...# #...#
        ...#. ##... #.... #.#.# #.#.# #...# ####. #...# ####.
        ...#. #.#.. #.... #...# #..## #...# #.... #.#.# #.#..
        #..#. #..#. #.... #...# #..## #...# #.... #..#. #..#.
        .##.. #...# ##### #...# #...# .###. #.... .##.# #...#
    """,
    "STUVWXYZ0": """
        .#### ##### #...# #...# #...# #...# #...# ##### .###.
        #.... ..#.. #...# #...# #...# #...# #...# ....# #..##
        #.... ..#.. #...# #...# #...# .#.#. .#.#. ...#. #.#.#
        .###. ..#.. #...# #...# #.#.# ..#.. ..#.. ..#.. #.#.#
        ....# ..#.. #...# .#.#. #.#.# .#.#. ..#.. .#... #.#.#
        ....# ..#.. #...# .#.#. ##.## #...# ..#.. #.... ##..#
        ####. ..#.. .###. ..#.. #...# #...# ..#.. ##### .###.
    """,
    "123456789": """
        ..#.. .###. ####. ...#. ##### .###. ##### .###. .###.
        .##.. #...# ....# ..##. #.... #.... ....# #...# #...#
        ..#.. ....# ....# .#.#. ####. #.... ...#. #...# #...#
        ..#.. ...#. .###. #..#. ....# ####. ..#.. .###. .####
        ..#.. ..#.. ....# ##### ....# #...# ..#.. #...# ....#
        ..#.. .#... ....# ...#. ....# #...# .#... #...# ....#
        .###. ##### ####. ...#. ####. .###. .#... .###. .###.
    """,
}


@lru_cache(maxsize=4096)
def shape_mask(shape: str, size: int) -> np.ndarray:
    """Return the mask of one of :data:`SHAPES`: bool `[size, size]`."""
    line = (np.arange(size) + 0.5) * 2 / size - 1
    x, y = line[None, :], line[:, None]  # from -1 at the left and top to 1 at the right and bottom
    radius, larger = np.hypot(x, y), np.maximum(abs(x), abs(y))
    if shape == "circle":
        return radius <= 1
    if shape == "square":
        return larger <= 0.85
    if shape == "triangle":
        return abs(x) <= (y + 1) / 2
    if shape == "cross":
        return np.minimum(abs(x), abs(y)) <= 0.3
    if shape == "diamond":
        return abs(x) + abs(y) <= 1
    if shape == "ring":
        return (radius <= 1) & (radius >= 0.55)
    if shape == "moon":
        return (radius <= 1) & (np.hypot(x - 0.5, y) >= 0.8)
    # Star: the radius changes linearly with the angle between its five points.
    turn = abs((np.arctan2(x, -y) * 5 / (2 * np.pi) + 0.5) % 1 - 0.5) * 2
    return radius <= 1 - 0.6 * turn


@lru_cache(maxsize=8192)
def text_mask(text: str, scale: int) -> np.ndarray:
    """Return the mask of capital letters and digits: bool `[7 * scale, (6 * len(text) - 1) * scale]`."""
    glyphs = _glyphs()
    mask = np.zeros((_HEIGHT, (_WIDTH + 1) * len(text) - 1), dtype=bool)
    for i, character in enumerate(text):
        mask[:, i * (_WIDTH + 1) :][:, :_WIDTH] = glyphs[character]
    return mask.repeat(scale, 0).repeat(scale, 1)


def text_scale(text: str, room: int) -> int:
    """Return the largest scale with which `text` fits into a square of `room` pixels; at least 1."""
    return max(1, room // max(_HEIGHT, (_WIDTH + 1) * len(text) - 1))


def draw(pixels: np.ndarray, mask: np.ndarray, colour: np.ndarray, top: int, left: int) -> None:
    """Fill a mask with a colour, uint8 `[3]`, in `pixels`, uint8 `[H, W, 3]`, clipped at the right and bottom."""
    place = pixels[top : top + mask.shape[0], left : left + mask.shape[1]]
    place[mask[: place.shape[0], : place.shape[1]]] = colour


@lru_cache(maxsize=1)
def _glyphs() -> dict[str, np.ndarray]:
    found = {}
    for characters, rows in _FONT.items():
        lines = [line.split() for line in rows.split("\n") if line.strip()]
        for i, character in enumerate(characters):
            found[character] = np.array([[pixel == "#" for pixel in line[i]] for line in lines])
    return found
