"""Seconds of a micro-batch by the lengths of its documents and the budget of its attention.

    t(micro-batch, k) = rest(Σ_d s_d) + L · Σ_d attention(s_d, k)

Forward and backward. `s` are tokens of a document, `k` keys that a query attends to, L layers. FLOPs do not predict
these times: a kernel has another rate for each length and budget, so both terms are measured (:mod:`.measure`), each
on its device, and interpolated: between the logarithms of lengths, budgets and seconds. Without a measurement
:func:`from_flops` is a fallback, and marked as one.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from effpass.core.errors import EffpassError
from effpass.core.strict_json import parse_json

__all__ = ["LatencyTable", "Source", "from_flops", "pairs", "read_table", "write_table"]

log = logging.getLogger("effpass")

Floats = NDArray[np.float64]
Source = Literal["measured", "flops", "synthetic"]
_SOURCES = ("measured", "flops", "synthetic")
_VERSION = 1
# Backward of attention has five products where forward has two.
_FORWARD_AND_BACKWARD = 3.5


@dataclass(frozen=True)
class LatencyTable:
    """A device's times for one model.

    Attributes:
        source: `measured`; `flops` for a fallback, `synthetic` for one that was made up: neither is a measurement.
        device: as the driver names it.
        dtype: of computation.
        torch: version that measured; empty where nothing was.
        model: what was measured, in words: sizes, block, whether layers are computed twice.
        layers: L of them.
        lengths: tokens of a document, ascending.
        budgets: keys of a query, ascending.
        attention: seconds of one layer's attention, `[lengths, budgets]`.
        tokens: of a micro-batch, ascending.
        rest: seconds of all else in a micro-batch, `[tokens]`.

    Raises:
        EffpassError: sizes that do not fit each other, a number that is no time, an order that does not ascend.
    """

    source: Source
    device: str
    dtype: str
    torch: str
    model: str
    layers: int
    lengths: tuple[int, ...]
    budgets: tuple[int, ...]
    attention: tuple[tuple[float, ...], ...]
    tokens: tuple[int, ...]
    rest: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.source not in _SOURCES:
            raise EffpassError(f"latency table: source is {self.source!r}, expected one of {', '.join(_SOURCES)}")
        if self.layers < 1:
            raise EffpassError(f"latency table: layers is {self.layers}, expected 1 or more")
        for name in ("lengths", "budgets", "tokens"):
            values = getattr(self, name)
            if not values or values[0] < 1 or any(b <= a for a, b in itertools.pairwise(values)):
                raise EffpassError(f"latency table: {name} is {list(values)}, expected numbers that ascend from 1 on")
        widths = {len(row) for row in self.attention}
        if len(self.attention) != len(self.lengths) or widths != {len(self.budgets)}:
            raise EffpassError(
                f"latency table: attention has {len(self.attention)} rows of {sorted(widths)}, expected"
                f" {len(self.lengths)} lengths of {len(self.budgets)} budgets"
            )
        if len(self.rest) != len(self.tokens):
            raise EffpassError(f"latency table: rest has {len(self.rest)} times for {len(self.tokens)} token counts")
        for value in (*self.rest, *(value for row in self.attention for value in row)):
            if not math.isfinite(value) or value <= 0:
                raise EffpassError(f"latency table: {value!r} is no time in seconds")

    def attention_seconds(self, lengths: ArrayLike, budgets: ArrayLike) -> Floats:
        """Of one layer: `[documents, budgets]`. A budget beyond a document's length is its length."""
        s, k = np.atleast_1d(np.asarray(lengths, float)), np.atleast_1d(np.asarray(budgets, float))
        grid = np.log(np.asarray(self.attention))
        row, by_length = _place(s, self.lengths)
        column, by_budget = _place(np.minimum(k, s[:, None]), self.budgets)
        row, by_length = row[:, None], by_length[:, None]
        last_row, last_column = np.minimum(row + 1, grid.shape[0] - 1), np.minimum(column + 1, grid.shape[1] - 1)
        low = grid[row, column] * (1 - by_budget) + grid[row, last_column] * by_budget
        high = grid[last_row, column] * (1 - by_budget) + grid[last_row, last_column] * by_budget
        return np.exp(low * (1 - by_length) + high * by_length)

    def rest_seconds(self, tokens: ArrayLike) -> Floats:
        """Of a micro-batch of so many tokens; in proportion to them beyond the last that was measured."""
        count, known = np.asarray(tokens, float), np.asarray(self.tokens, float)
        return np.interp(count, known, self.rest) * np.maximum(count / known[-1], 1.0)

    def is_for(self, device: str, dtype: str, model: str) -> bool:
        return (self.device, self.dtype, self.model) == (device, dtype, model)


def _place(values: Floats, known: Sequence[int]) -> tuple[NDArray[np.int64], Floats]:
    """The known value below each, and how far in logarithms it is to the next: above 1 beyond the last, 0 before the
    first, where a kernel takes what it takes to start."""
    at = np.log(np.asarray(known, float))
    x = np.log(np.maximum(values, 1.0))
    below = np.clip(np.searchsorted(at, x, side="right") - 1, 0, max(len(at) - 2, 0))
    if len(at) == 1:
        return below, np.zeros_like(x)
    return below, np.maximum((x - at[below]) / (at[below + 1] - at[below]), 0.0)


def pairs(lengths: ArrayLike, budgets: ArrayLike) -> Floats:
    """Pairs of query and key in causal documents whose queries attend to `k` keys at most: `[documents, budgets]`."""
    s, k = np.atleast_1d(np.asarray(lengths, float))[:, None], np.atleast_1d(np.asarray(budgets, float))[None]
    k = np.minimum(k, s)
    return k * s - k * (k - 1) / 2


def from_flops(
    lengths: Sequence[int],
    budgets: Sequence[int],
    *,
    layers: int,
    attention_width: int,
    parameters: int,
    rate: float,
    model: str = "",
    device: str = "",
    dtype: str = "bfloat16",
) -> LatencyTable:
    """Times as if every FLOP took as long: a fallback where nothing can be measured, marked ``source="flops"``.

    Args:
        lengths, budgets: of the table.
        layers: L.
        attention_width: query heads times their size.
        parameters: in products with activations, for each of which a token takes 6 FLOPs.
        rate: FLOP/s.
        model, device, dtype: what it stands for.
    """
    attention = 4 * _FORWARD_AND_BACKWARD * attention_width * pairs(lengths, budgets) / rate
    rest = [6 * parameters * s / rate for s in lengths]
    return LatencyTable(
        "flops", device, dtype, "", model, layers, tuple(lengths), tuple(budgets),
        tuple(map(tuple, attention.tolist())), tuple(lengths), tuple(rest),
    )  # fmt: skip


# -- files ------------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> LatencyTable:
    """A table as :func:`write_table` wrote it.

    Raises:
        EffpassError: not a file, not a table, or a damaged one; names the file.
    """
    try:
        found = parse_json(path.read_bytes())
    except OSError as error:
        raise EffpassError(f"{path}: {error.strerror}", hint="leave it out, and the device is measured") from error
    except ValueError as error:
        raise EffpassError(f"{path}: {error}", hint="remove it, and the device is measured") from error
    names = {field.name for field in fields(LatencyTable)}
    if not isinstance(found, dict) or found.pop("version", None) != _VERSION or found.keys() != names:
        raise EffpassError(f"{path}: no latency table of this version", hint="remove it, and the device is measured")
    try:
        return LatencyTable(**{name: _checked(name, value) for name, value in found.items()})
    except (TypeError, ValueError) as error:
        raise EffpassError(f"{path}: {error}", hint="remove it, and the device is measured") from error
    except EffpassError as error:
        raise EffpassError(f"{path}: {error.message}", hint="remove it, and the device is measured") from error


def write_table(path: Path, table: LatencyTable) -> None:
    """Whole or not at all; where it can't be written, a warning says so, and the next process measures again."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"version": _VERSION, **asdict(table)}, indent=1), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        log.warning("the latency table can't be kept in %s: %s", path.parent, error.strerror)
        with suppress(OSError):
            temporary.unlink()


def _checked(name: str, value: Any) -> Any:
    """A field's value out of JSON, in the type that the table has."""
    if name in ("source", "device", "dtype", "torch", "model"):
        if not isinstance(value, str):
            raise ValueError(f"{name} is {value!r}, expected a string")
        return value
    if name == "attention":
        return tuple(tuple(map(_number, row)) for row in value)
    if name == "rest":
        return tuple(map(_number, value))
    if name == "layers":
        return _whole(value)
    return tuple(map(_whole, value))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is no whole number")
    return value
