"""Area `linear_attention` of the benchmarks: what its studies of quality feed, compare and report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import linear_attention, linear_attention_conversion, linear_attention_quality
from benchmarks.linear_attention_quality import FORMS, Size, _parameters, configs, recall_accuracy, recall_batch, train
from benchmarks.rows import write

SIZE = Size(64, 32, 1, 2, 16, 32, 4, 8)


def test_recall_asks_each_key_once_for_its_value():
    ids, targets = recall_batch(SIZE, 4, torch.Generator().manual_seed(0), 50, "cpu")
    assert ids.shape == targets.shape == (50, 32)
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[0:8:2], row[1:8:2], strict=True))
        asked = {row[i]: value for i, value in enumerate(wanted) if value != -100}
        assert len(pairs) == 4
        assert asked == pairs  # 4 keys, each once
        assert all(0 < key < 32 <= value < 64 for key, value in pairs.items())
        assert all(value == -100 for value in wanted[:8])


def test_forms_have_equal_parameters_and_states():
    size = Size(8192, 128, 2, 2, 32, 128, 1, 1)
    made = configs(size)
    assert list(made) == list(FORMS)
    counts = {form: _parameters(config) for form, config in made.items()}
    assert max(counts.values()) - min(counts.values()) <= 3 * size.width * size.layers
    for form, config in made.items():
        if form not in ("window", "attention"):
            described = config.linear_attention
            state = 4 * described["num_value_heads"] * described["key_head_dim"] * described["value_head_dim"]
            assert state == made["window"].sliding_window * 2 * 2 * size.heads * size.channels
    assert made["attention"].sliding_window is None


@pytest.mark.parametrize("form", ["fg2+", "window"])
def test_training_repeats_itself(form):
    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return recall_batch(SIZE, 4, torch.Generator().manual_seed(step), 8, "cpu")

    first, second = (train(configs(SIZE)[form], SIZE, 0, "cpu", batch) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert 0 <= recall_accuracy(first, SIZE, 4, "cpu") < 0.5


def test_rows_of_recall_and_of_text(tmp_path: Path):
    names = [*(f"recall-16x16-{form}" for form in FORMS), "pretraining-fg2+"]
    assert set(linear_attention_quality.CASES) <= set(linear_attention.CASES)
    for name in names:
        for row in linear_attention.CASES[name]("cpu", True):
            write(row, tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    recalled = [row for row in rows if row["metric"] == "recall"]
    assert [row["case"].partition(",")[0] for row in recalled] == list(FORMS)
    losses = [row for row in rows if row["metric"].startswith("loss")]
    assert [row["metric"] for row in losses][:2] == ["loss of tokens 0 to 1", "loss of tokens 1 to 2"]
    assert len(losses) == 8
    assert all(0 < row["ours"] < 2 * math.log2(256) and row["runs"] == 3 for row in losses)


def test_rows_of_a_conversion():
    assert set(linear_attention_conversion.CASES) <= set(linear_attention.CASES)
    rows = {row.metric: row for row in linear_attention.CASES["conversion-fg2+-50"]("cpu", True)}
    assert list(rows) == [
        "perplexity after align", "perplexity after distill", "perplexity after whole", "needles found in 256 bytes",
        "needles found in 1024 bytes", "cache of a sequence of 8192 tokens",
    ]  # fmt: skip
    assert all(row.peer_name == "before" and "50 % of the layers" in row.case for row in rows.values())
    assert rows["perplexity after distill"].ours > 1
    cache = rows["cache of a sequence of 8192 tokens"]
    # One of two layers: 4 heads of 8 x 8 in float32, 3 inputs of 96 channels, and keys and values of 2 heads of 8.
    kept = 2 * 2 * 2 * 8 * 8192
    assert cache.peer == pytest.approx(2 * kept / 2**20, rel=1e-4)
    assert cache.ours == pytest.approx((kept + 4 * 4 * 8 * 8 + 2 * 3 * 96) / 2**20, rel=1e-4)
