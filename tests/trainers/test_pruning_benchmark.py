"""Area `pruning` of the benchmarks: its rows, and the tables that the documents make of them."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pruning
from benchmarks.__main__ import AREAS
from benchmarks.pruning_runs import Found, Run

ROOT = Path(__file__).parents[2]
SIZES = {"kv_groups": 2, "ffn_channels": 1088}
# Nats on WikiText-2, by chooser; what a run found on answers is half of it.
LOSSES = {"minimax": 3.0, "taylor": 3.1, "activation": 3.2, "depth": 3.5}


@pytest.fixture
def rows(monkeypatch) -> list[Any]:
    """Of case `quality-0.7`, as if its runs had been made."""

    def found(run: Run) -> Found:
        loss = LOSSES[run.choose] + 0.01 * run.seed * (run.choose == "minimax")
        is_ours = run.choose == "minimax"
        sizes = {"layers": 21} if run.choose == "depth" else SIZES
        overlap = dict.fromkeys(SIZES, 0.8) if is_ours else {}
        return Found((loss, 0.0), (loss / 2, 0.0), loss + 1, 0.7, sizes, overlap, peak=2**32 if is_ours else 0)

    monkeypatch.setattr(pruning, "results", lambda runs: [found(run) for run in runs])
    monkeypatch.setattr(pruning, "_whole", lambda run: ((2.9, 0.0), (1.4, 0.0)))
    monkeypatch.setattr(pruning, "read_source", lambda name: (_Config(),))
    return list(pruning.CASES["quality-0.7"]("cpu", False))


class _Config:
    num_hidden_layers = 30

    def get_text_config(self) -> _Config:
        return self


def test_a_row_compares_the_same_seeds_and_says_what_is_left(rows):
    assert "pruning" in AREAS
    (taylor,) = [row for row in rows if row.peer_name == "taylor" and row.unit == ""]
    assert taylor.ours == pytest.approx(math.exp(3.01), rel=1e-4)
    assert taylor.note.startswith("difference -0.0900 ± 0.0058 nats over 3 seeds; ")
    assert "0.700 (2 kv_groups 1088 ffn_channels) against 0.700 (2 kv_groups" in taylor.note
    assert taylor.ratio > 1
    (depth,) = [row for row in rows if row.peer_name == "depth" and row.unit == "nats"]
    assert "against 0.700 (21 layers)" in depth.note
    (peak,) = [row for row in rows if row.unit == "GiB"]
    assert (peak.ours, peak.bound) == (4.0, 8.0)


def test_the_documents_have_a_table_of_them_and_say_so_while_there_are_none(rows, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    for part in ("pruning", "pruning_speed"):
        assert generate.PARTS[part](tmp_path) == "No rows have been committed yet.\n"
    file = tmp_path / "benchmarks" / "results" / "pruning.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    quality, rest = (generate.PARTS[part](tmp_path) for part in ("pruning", "pruning_speed"))
    assert len(quality.splitlines()) == 2 + 2 * 3  # two figures, three peers
    assert "| 20.29 | 22.2 (taylor) | -0.0900 ± 0.0058 over 3 seeds | 0.700 (2 kv_groups" in quality
    assert len(rest.splitlines()) == 2 + 3  # overlap of two kinds of units, and memory
    assert "4 GiB" in rest
