"""Latency table: seconds of a micro-batch, given the lengths of its documents and the budget of its attention.

    t(micro-batch, k) = rest(Σ_d s_d) + L · Σ_d attention(s_d, k)

t is the time of forward and backward pass, s_d the length of document d in tokens, k the number of keys that a query
attends to, and L the number of layers. FLOPs do not predict these times, since the speed of a kernel differs between
lengths and budgets. Both terms are therefore measured on the device (:mod:`.measure`) and interpolated: attention
linearly between the logarithms of lengths, budgets and seconds, and the rest linearly between numbers of tokens. Where
no measurement is possible, :func:`from_flops` makes a table that is marked as an estimate.
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
# Cost of forward and backward, relative to forward: the backward pass of attention has five products, the forward two.
_FORWARD_AND_BACKWARD = 3.5


@dataclass(frozen=True)
class LatencyTable:
    """Times of one model on one device.

    Attributes:
        source: origin of the times: `measured`; `flops` for an estimate, or `synthetic` for invented times.
        device: name of the device as reported by its driver.
        dtype: dtype of computation.
        torch: version of torch during the measurement; empty if nothing was measured.
        model: description of what was measured: sizes of the model, and the settings of attention and micro-batches.
        layers: number of layers L.
        lengths: document lengths in tokens, ascending.
        budgets: budgets in keys, ascending.
        attention: seconds of the attention of one layer for one document, `[lengths, budgets]`.
        tokens: numbers of tokens of a micro-batch, ascending.
        rest: seconds of everything but attention in a micro-batch, `[tokens]`.

    Raises:
        EffpassError: if sizes do not match each other, a time is not positive and finite, a sequence is not ascending,
            or another value is invalid.
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
        """Return the seconds of one layer `[documents, budgets]`; budgets are limited to the length of a document."""
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
        """Return the seconds outside of attention for numbers of tokens per micro-batch.

        Above the largest measured number, the time is proportional to the number of tokens.
        """
        count, known = np.asarray(tokens, float), np.asarray(self.tokens, float)
        return np.interp(count, known, self.rest) * np.maximum(count / known[-1], 1.0)

    def is_for(self, device: str, dtype: str, model: str) -> bool:
        """Return whether the table is for this device, dtype and description of a model."""
        return (self.device, self.dtype, self.model) == (device, dtype, model)


def _place(values: Floats, known: Sequence[int]) -> tuple[NDArray[np.int64], Floats]:
    """Return, for each value, the index of the known value below it and its logarithmic position up to the next one.

    The position is larger than 1 for values above the last known one. It is 0 below the first, where starting the
    kernel determines the time.
    """
    at = np.log(np.asarray(known, float))
    x = np.log(np.maximum(values, 1.0))
    below = np.clip(np.searchsorted(at, x, side="right") - 1, 0, max(len(at) - 2, 0))
    if len(at) == 1:
        return below, np.zeros_like(x)
    return below, np.maximum((x - at[below]) / (at[below + 1] - at[below]), 0.0)


def pairs(lengths: ArrayLike, budgets: ArrayLike) -> Floats:
    """Return the number of query-key pairs `[documents, budgets]` of causal attention with at most k keys per query."""
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
    """Return a table in which all FLOPs take equal time, marked ``source="flops"``, for devices that can't be measured.

    Args:
        lengths, budgets: document lengths and budgets of the table.
        layers: number of layers L.
        attention_width: number of query heads times head size.
        parameters: number of parameters that are multiplied with activations, at 6 FLOPs per token and parameter.
        rate: assumed speed in FLOP/s.
        model, device, dtype: description of the model, name of the device and dtype that the table is for.
    """
    attention = 4 * _FORWARD_AND_BACKWARD * attention_width * pairs(lengths, budgets) / rate
    rest = [6 * parameters * s / rate for s in lengths]
    return LatencyTable(
        "flops", device, dtype, "", model, layers, tuple(lengths), tuple(budgets),
        tuple(map(tuple, attention.tolist())), tuple(lengths), tuple(rest),
    )  # fmt: skip


# -- files ------------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> LatencyTable:
    """Read a table that :func:`write_table` wrote.

    Raises:
        EffpassError: if the file can't be read, is not a table of this version, or is damaged; the message names the
            file.
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
    """Write a table atomically.

    If the file can't be written, a warning is logged, and the next process measures again.
    """
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
    """Return the value of a field from JSON, converted to the field's type."""
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
