"""What the benchmark of quality trains: the same documents for all ways, budgets that move, equal tokens or time."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import balance_quality
from benchmarks.balance_quality import Run, Sizes, _documents, _run, _scaled

SIZES = Sizes("cpu", 32, 32, 3, (2, (256,)))


@pytest.fixture(autouse=True)
def _few_ranks(monkeypatch):
    monkeypatch.setattr(balance_quality, "RANKS", 2)
    monkeypatch.delenv("EFFPASS_TABLE", raising=False)


def test_documents_are_the_same_for_all_ways_and_have_what_is_graded():
    one, two = _documents(SIZES, 0, 1), _documents(SIZES, 0, 1)
    assert all(np.array_equal(a, b) and np.array_equal(c, d) for (a, c), (b, d) in zip(one, two, strict=True))
    assert [len(ids) for ids, _ in one] != [len(ids) for ids, _ in _documents(SIZES, 1, 1)]
    (code, all_of_it), (needles, answers) = one[:2]
    assert all_of_it.sum() == len(code) - 1
    assert 0 < answers.sum() < 0.5 * len(needles)
    assert bytes(needles[: answers.argmax()]).endswith(b" is")


def test_a_scaled_table_is_the_large_one_at_a_multiple():
    large, small = balance_quality.the_table(), _scaled(32, 2)
    assert small.layers == 2
    mine = 2 * small.attention_seconds([1024], [256])[0, 0]
    assert mine == pytest.approx(large.layers * large.attention_seconds([32 * 1024], [32 * 256])[0, 0], rel=1e-6)


@pytest.mark.slow
def test_budgets_move_and_time_is_what_is_equal():
    fixed = _run(Run(SIZES, "none", 0, SIZES.steps, 0.0, ""))
    assert (fixed.budget, fixed.steps) == (SIZES.tuning.default, SIZES.steps)
    moved = _run(Run(SIZES, "both", 0, 4 * SIZES.steps, fixed.seconds * fixed.steps, ""))
    assert moved.budget != SIZES.tuning.default
    assert moved.seconds <= fixed.seconds
    assert moved.steps >= fixed.steps
    assert 0 < moved.loss < 7
    assert set(moved.right) == {256}
