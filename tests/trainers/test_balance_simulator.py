"""The simulator against what can be said without it, and its figures on a table that is made up."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.balance_lengths import BUDGETS, DEFAULT, LENGTHS, coverage, fixed_table, the_table
from effpass.core.errors import EffpassError
from effpass.trainers.balance.costs import micro_batches
from effpass.trainers.balance.simulator import Layout, play, simulate
from effpass.trainers.balance.table import write_table
from effpass.trainers.balance.tuning import Tuning, imbalance

TUNING = Tuning(BUDGETS, DEFAULT)
FIXED = replace(TUNING, direction="none")


@pytest.fixture
def table(monkeypatch, tmp_path):
    """The one that is made up, whatever was measured meanwhile."""
    from benchmarks import balance_lengths

    monkeypatch.delenv("EFFPASS_TABLE", raising=False)
    monkeypatch.setattr(balance_lengths, "_MEASURED", tmp_path / "none.json")
    found = the_table()
    assert found.source == "synthetic"
    return found


def test_equal_samples_wait_for_nobody_and_a_step_takes_what_the_table_says(table):
    layout = Layout(4, 3, 2, 40_000)
    found = simulate(table, [20_000] * 64, layout, TUNING, coverage, "seconds", steps=3)
    alone = 36 * 2 * table.attention_seconds(20_000, DEFAULT)[0, 0] + float(table.rest_seconds(40_000))
    assert found.seconds == pytest.approx(3 * alone)
    assert (found.imbalance, found.bubble, found.budget) == (pytest.approx(1), pytest.approx(0), DEFAULT)
    assert found.coverage == pytest.approx((DEFAULT / 20_000) ** 0.25)


def test_micro_batches_add_up_documents_and_know_the_longest(table):
    attention, rest, longest = micro_batches(table, [[[0, 2]], [[1]]], [3000, 50_000, 9000], BUDGETS)
    each = table.attention_seconds([3000, 50_000, 9000], BUDGETS)
    np.testing.assert_allclose(attention[:, 0], [each[0] + each[2], each[1]])
    np.testing.assert_allclose(rest[:, 0], table.rest_seconds([12_000, 50_000]))
    assert longest.tolist() == [[9000], [50_000]]


def test_imbalance_and_bubbles_are_of_those_who_wait_for_each_other():
    seconds = np.array([[1.0, 4.0], [3.0, 4.0]])
    assert imbalance(seconds, TUNING.waits) == (1.25, pytest.approx(1 - 6 / 7))
    assert imbalance(seconds, "step") == (pytest.approx(7 / 6), pytest.approx(1 - 6 / 7))


def test_all_batchings_read_the_same_samples_in_a_step(table):
    every = LENGTHS["tail"](100, np.random.default_rng(0))
    layout = Layout(4, 2, 2, 150_000)
    for steps in zip(*(play(table, every, layout, FIXED, coverage, way, steps=8) for way in ("random", "length"))):  # noqa: B905
        assert steps[0].lengths.tolist() == steps[1].lengths.tolist()
        for step in steps:
            assert sorted(itertools.chain(*(m for rank in step.shares for m in rank))) == list(range(16))


@pytest.mark.parametrize("ranks", [8, 32])
@pytest.mark.parametrize("lengths", sorted(LENGTHS))
def test_batching_and_tuning_together_beat_each_alone_and_batching_by_length(table, lengths, ranks):
    every = LENGTHS[lengths](4096, np.random.default_rng(0))
    layout = Layout(ranks, 4, 2, 2 * int(every.max()))

    def played(batching, how):
        return simulate(table, every, layout, how, coverage, batching, steps=12)

    base, by_length = played("random", FIXED), played("length", FIXED)
    alone, tuned, both = played("seconds", FIXED), played("random", TUNING), played("seconds", TUNING)
    assert base.imbalance > 1.8
    assert both.imbalance < 1.34
    assert both.seconds < base.seconds / 1.33
    assert both.seconds < min(alone.seconds, tuned.seconds, by_length.seconds)
    assert tuned.seconds < base.seconds
    assert alone.seconds < 1.01 * by_length.seconds


def test_a_table_that_is_named_is_taken_and_the_one_beside_it_for_a_fixed_budget(table, tmp_path, monkeypatch):
    write_table(tmp_path / "mine.json", replace(table, source="measured", device="mine"))
    column = BUDGETS.index(DEFAULT)
    own = replace(table, budgets=(DEFAULT,), attention=tuple((row[column],) for row in table.attention), device="mine")
    write_table(tmp_path / "mine_fixed.json", own)
    monkeypatch.setenv("EFFPASS_TABLE", str(tmp_path / "mine.json"))
    assert the_table().device == "mine"
    assert fixed_table() == own
    layout = Layout(4, 2, 2, 150_000)
    every = LENGTHS["tail"](100, np.random.default_rng(0))
    one, two = (simulate(t, every, layout, FIXED, coverage, "seconds", steps=3) for t in (the_table(), fixed_table()))
    assert one.seconds == pytest.approx(two.seconds, rel=1e-6)


def test_too_few_samples_and_too_little_memory_are_named(table):
    with pytest.raises(EffpassError, match="a step takes 16 samples, and there are 15"):
        simulate(table, [9000] * 15, Layout(4, 2, 2, 20_000), TUNING, coverage, "length", steps=1)
    with pytest.raises(EffpassError, match=r"16 samples of 144000 tokens do not fit into 4 x 2 micro-batches of 10000"):
        simulate(table, [9000] * 16, Layout(4, 2, 2, 10_000), TUNING, coverage, "length", steps=1)
