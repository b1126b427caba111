"""What area `balance` is fed with: lengths of samples as SparseBalance's data have them, and tables.

Source of the distributions: SparseBalance (arXiv 2604.13847), which trains on samples of which some are shorter than 4k
and the others longer than 16k (ChatQA2-Long-SFT), and on a long tail from 8k to 72k (LongAlign-10k). The shape between
these borders is an assumption made here.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from effpass.trainers.balance.table import LatencyTable, pairs, read_table

__all__ = [
    "BUDGETS",
    "DEFAULT",
    "EXPONENT",
    "LENGTHS",
    "MOST",
    "SURE",
    "beside",
    "coverage",
    "fixed_table",
    "the_table",
]

DEFAULT = 8192
BUDGETS = (*range(2048, 16384, 1024), 16384, 20480, 24576, 32768)
MOST = 73728
#: Of the assumed coverage: k of s keys hold the share (k / s) ** EXPONENT of the router's weight. The larger it is, the
#: less may budgets fall. Case `coverage` measures a small model, whose router is far surer of itself: the second value.
EXPONENT = 0.25
SURE = 0.02

_MEASURED = Path(__file__).parent / "results" / "latency_h200.json"


def bimodal(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Half of them 256 to 4096 tokens long, half 16384 to 32768, each alike in logarithms."""
    short, long = (np.exp(rng.uniform(np.log(a), np.log(b), count)) for a, b in ((256, 4096), (16384, 32768)))
    return np.where(rng.random(count) < 0.5, short, long).astype(np.int64)


def tail(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """From 8192 to 73728 tokens, with a density that falls as the square of the length."""
    return (1 / (1 / 8192 - rng.random(count) * (1 / 8192 - 1 / MOST))).astype(np.int64)


LENGTHS = {"bimodal": bimodal, "tail": tail}


def coverage(
    lengths: NDArray[np.float64], budgets: NDArray[np.float64], exponent: float = EXPONENT
) -> NDArray[np.float64]:
    return np.minimum(np.asarray(budgets) / np.asarray(lengths), 1.0) ** exponent


def the_table() -> LatencyTable:
    """The one that EFFPASS_TABLE names, else the committed one, measured on an H200, else one that is made up."""
    path = _path()
    return _synthetic() if path is None else read_table(path)


def fixed_table() -> LatencyTable:
    """Times where no budget but the default can occur: buffers are sized by the largest that can, and launches too."""
    path = _path()
    return _synthetic() if path is None else read_table(beside(path))


def beside(path: Path) -> Path:
    """Where the table of a fixed budget stands."""
    return path.with_name(f"{path.stem}_fixed.json")


def _path() -> Path | None:
    if named := os.environ.get("EFFPASS_TABLE"):
        return Path(named)
    return _MEASURED if _MEASURED.exists() else None


def _synthetic() -> LatencyTable:
    """A model of 3 billion parameters in 36 layers with 16 heads of 128: products at 400 TFLOP/s, attention at 150
    TFLOP/s and 60 µs to start. Made up, so that everything runs before a device was measured."""
    lengths = (*(256 << n for n in range(9)), MOST)
    attention = 14 * 16 * 128 * pairs(lengths, BUDGETS) / 150e12 + 60e-6
    rest = [6 * 3.0e9 * count / 400e12 + 5e-3 for count in lengths]
    return LatencyTable(
        "synthetic", "no device", "bfloat16", "", "made up: 3e9 parameters, 36 layers of 16 heads of 128", 36, lengths,
        BUDGETS, tuple(map(tuple, attention.tolist())), lengths, tuple(rest),
    )  # fmt: skip
