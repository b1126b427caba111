"""Plans of balanced training: tables, budgets, shares and batches, as functions of numbers."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import replace

import numpy as np
import pytest
from torch.utils.data import DataLoader

from effpass.core.errors import EffpassError
from effpass.trainers.balance.batches import BalancedBatches
from effpass.trainers.balance.costs import micro_batches, sample_seconds
from effpass.trainers.balance.expected import Expected, octave
from effpass.trainers.balance.shares import share
from effpass.trainers.balance.table import from_flops, pairs, read_table, write_table
from effpass.trainers.balance.tuning import Tuning, group_seconds, guard, imbalance, micro_batch_seconds, slowest, tune

BUDGETS = (1024, 2048, 4096, 8192)
LENGTHS = tuple(256 * 2**n for n in range(10))
TABLE = from_flops(LENGTHS, BUDGETS, layers=4, attention_width=512, parameters=20_000_000, rate=1e14)
TUNING = Tuning(BUDGETS, 4096)


# -- the table --------------------------------------------------------------------------------------------------------


def test_what_was_measured_comes_back_and_what_lies_between_lies_between():
    found = TABLE.attention_seconds(LENGTHS, BUDGETS)
    # Below its length a budget is the length: the table's first budget is the least that it knows.
    known = np.asarray(TABLE.attention)
    is_below = np.asarray(BUDGETS)[None] <= np.asarray(LENGTHS)[:, None]
    np.testing.assert_allclose(found[is_below], known[is_below])
    between = TABLE.attention_seconds([24_000], [3000])[0, 0]
    assert known[6, 1] < between < known[7, 2]
    # FLOPs are nearly a power of length and budget, so interpolation between logarithms is close.
    exact = known[7, 1] / pairs([LENGTHS[7]], [2048])[0, 0] * pairs([24_000], [3000])[0, 0]
    assert between == pytest.approx(exact, rel=0.03)


def test_beyond_the_table_times_go_on_as_they_grew():
    far = TABLE.attention_seconds([4 * LENGTHS[-1]], [1024])[0, 0]
    assert far == pytest.approx(4 * TABLE.attention[-1][0], rel=0.02)
    assert float(TABLE.rest_seconds(4 * LENGTHS[-1])) == pytest.approx(4 * TABLE.rest[-1])
    short = TABLE.attention_seconds([1], BUDGETS)
    np.testing.assert_allclose(short, TABLE.attention[0][0])


def test_a_table_of_one_length_and_one_budget_is_a_constant():
    one = replace(TABLE, lengths=(64,), budgets=(32,), attention=((0.5,),), tokens=(64,), rest=(0.25,))
    assert one.attention_seconds([7, 9000], [1, 5000]).tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert one.rest_seconds([32, 128]).tolist() == [0.25, 0.5]


def test_a_table_is_the_same_after_its_file(tmp_path):
    path = tmp_path / "deep" / "table.json"
    write_table(path, TABLE)
    assert read_table(path) == TABLE
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]


def test_a_folder_that_can_not_be_written_is_told(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "effpass"):
        write_table(tmp_path / "file" / "table.json", TABLE)
    assert "the latency table can't be kept" in caplog.text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rest": [float(n + 1) for n in range(3)]}, "rest has 3 times for 10 token counts"),
        ({"lengths": [4, 2]}, r"lengths is \[4, 2\], expected numbers that ascend"),
        ({"layers": 0}, "layers is 0"),
        ({"layers": "x"}, "'x' is no whole number"),
        ({"source": "guessed"}, "source is 'guessed'"),
        ({"rest": [-1.0] * 10}, "-1.0 is no time"),
        ({"attention": [[True] * 4] * 10}, "True is no number"),
        ({"attention": 3}, "not iterable"),
        ({"version": 9}, "no latency table of this version"),
        ({"more": 1}, "no latency table of this version"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, change, says):
    path = tmp_path / "table.json"
    write_table(path, TABLE)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(EffpassError, match=rf"table\.json: .*{says}"):
        read_table(path)


# -- budgets ----------------------------------------------------------------------------------------------------------


def some_step(seed: int = 0, ranks: int = 4, micro_steps: int = 3, layers: int = 4):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2048, 65536, (ranks, micro_steps))
    attention = TABLE.attention_seconds(lengths.ravel(), BUDGETS).reshape(ranks, micro_steps, -1)
    curves = np.sort(rng.random((ranks, micro_steps, layers, len(BUDGETS))), -1)
    return attention, TABLE.rest_seconds(lengths), curves


def test_the_guard_is_what_its_inequality_says():
    curves = np.array([[0.5, 0.85, 0.9, 1.0], [0.1, 0.2, 0.5, 0.52], [1.0, 1.0, 1.0, 1.0]])
    lowest, highest = guard(curves, 2, 0.1)
    assert lowest.tolist() == [1, 2, 0]
    assert highest.tolist() == [3, 3, 2]
    assert [array.tolist() for array in guard(curves, 2, 0.0)] == [[2, 2, 0], [2, 2, 2]]


@pytest.mark.parametrize("waits", ["micro_step", "step", "pipeline"])
@pytest.mark.parametrize("anchor", ["mean", "min", "max"])
def test_no_budget_passes_the_guard_and_no_step_gets_slower(anchor, waits):
    attention, rest, curves = some_step()
    how = replace(TUNING, anchor=anchor, waits=waits)
    lowest, highest = guard(curves, how.index, how.p)
    chosen = tune(attention, rest, lowest, highest, how)
    assert ((lowest <= chosen) & (chosen <= highest)).all()
    default = np.full_like(chosen, how.index)
    before, after = (micro_batch_seconds(attention, rest, which) for which in (default, chosen))
    assert slowest(after, waits) <= slowest(before, waits) * (1 + 1e-9)
    assert (chosen != default).any()


def test_directions_move_budgets_one_way_and_both_is_at_least_as_fast_as_up():
    attention, rest, curves = some_step()
    found, seconds = {}, {}
    for direction in ("none", "down", "up", "both"):
        how = replace(TUNING, direction=direction)
        found[direction] = tune(attention, rest, *guard(curves, how.index, how.p), how)
        seconds[direction] = slowest(micro_batch_seconds(attention, rest, found[direction]), "micro_step")
    assert (found["none"] == 2).all()
    assert (found["down"] <= 2).all()
    assert (found["down"] < 2).any()
    assert (found["up"] >= 2).all()
    assert (found["up"] > 2).any()
    assert seconds["both"] == pytest.approx(seconds["down"])
    assert seconds["down"] < seconds["up"] == pytest.approx(seconds["none"])


def test_the_budget_is_the_largest_that_the_anchor_allows():
    """Against every combination of one layer's budgets, one micro-batch a rank and no guard."""
    attention, rest, _ = some_step(1, ranks=3, micro_steps=1, layers=1)
    free = np.zeros((3, 1, 1), np.int64)
    chosen = tune(attention, rest, free, free + 3, replace(TUNING, direction="down"))
    base = rest + attention[..., 2]
    for rank in range(3):
        fitting = [k for k in range(4) if rest[rank, 0] + attention[rank, 0, k] <= base.mean()]
        expected = 2 if base[rank, 0] <= base.mean() else max(fitting, default=0)
        assert chosen[rank, 0, 0] == expected


def test_without_a_budget_that_is_fast_enough_the_guard_has_the_last_word():
    attention = np.array([[[1.0, 2.0, 4.0, 8.0]], [[0.1, 0.2, 0.4, 0.8]]])
    rest = np.array([[100.0], [1.0]])
    lowest, highest = np.array([[[1]], [[1]]]), np.array([[[3]], [[3]]])
    assert tune(attention, rest, lowest, highest, TUNING)[0, 0, 0] == 1
    # The other may use the time in which it would wait for the first.
    assert tune(attention, rest, lowest, highest, TUNING)[1, 0, 0] == 3


def test_equal_micro_batches_keep_their_budgets():
    attention, rest = np.tile(np.array([1.0, 2.0, 4.0, 8.0]), (4, 2, 1)), np.ones((4, 2))
    free = np.zeros((4, 2, 3), np.int64)
    assert (tune(attention, rest, free, free + 3, TUNING) == TUNING.index).all()


def test_groups_are_who_waits_for_whom():
    seconds = np.array([[1.0, 5.0], [4.0, 2.0]])
    assert group_seconds(seconds, "micro_step").tolist() == [[1, 4], [5, 2]]
    assert group_seconds(seconds, "step").tolist() == [[6, 6]]
    assert group_seconds(seconds, "pipeline").tolist() == [[1, 5, 4, 2]]
    assert [slowest(seconds, waits) for waits in ("micro_step", "step", "pipeline")] == [9, 6, 6]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"budgets": (2, 1)}, r"budgets: got \[2, 1\]"),
        ({"default": 3}, r"default: got 3, expected one of the budgets"),
        ({"p": 1.0}, "p: got 1.0, expected a share"),
        ({"anchor": "least"}, "anchor: got 'least'; known: max, mean, min"),
        ({"direction": "dwn"}, "direction: got 'dwn', did you mean 'down'"),
    ],
)
def test_tuning_out_of_range_is_refused(values, says):
    with pytest.raises(EffpassError, match=says):
        replace(TUNING, **values)


# -- what is expected -------------------------------------------------------------------------------------------------


def test_averages_move_by_length_and_lengths_that_were_not_seen_keep_their_budget():
    expected = Expected(TUNING, 4)
    expected.end_step([3000, 40_000, 45_000], [8192, 1024, 2048])
    found = expected.budgets([2048, 4095, 33_000, 9000], after=1)
    assert found.tolist() == pytest.approx([0.9 * 4096 + 0.1 * 8192] * 2 + [0.9 * 4096 + 0.1 * 1536, 4096])
    assert expected.budgets([3000], after=0).tolist() == [4096]
    assert octave([1, 1023, 1024]).tolist() == [0, 9, 10]
    lowest, highest = expected.guard([[3000], [40_000]])
    assert lowest.shape == (2, 1, 4)
    assert (lowest == 2).all()
    assert (highest == 2).all()
    expected.cover(40_000, np.tile([0.5, 0.85, 0.9, 1.0], (4, 1)))
    assert expected.guard([40_000])[0].tolist() == [[1] * 4]


def test_a_state_is_plain_and_goes_on_where_it_was():
    one, two = Expected(TUNING, 2), Expected(TUNING, 2)
    for step in range(5):
        one.end_step([1000 * (step + 1)], [1024 * (step % 3 + 1)])
    one.cover(9000, np.array([[0.1, 0.2, 0.3, 0.4]] * 2))
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for each in (one, two):
        each.end_step([2500], [2048])
    lengths = [500, 1500, 2500, 5000, 9000]
    assert all(one.budgets(lengths, n).tolist() == two.budgets(lengths, n).tolist() for n in range(7))
    assert np.array_equal(one.guard(lengths), two.guard(lengths))
    with pytest.raises(EffpassError, match="of 2 layers, and the run"):
        Expected(TUNING, 3).load_state_dict(one.state_dict())


# -- shares -----------------------------------------------------------------------------------------------------------


def flat(shares) -> list[int]:
    return sorted(n for rank in shares for micro in rank for n in micro)


def step_seconds(shares, costs) -> float:
    return float(np.array([[sum(costs[n] for n in micro) for micro in rank] for rank in shares]).max(0).sum())


@pytest.mark.parametrize("seed", range(6))
def test_every_sample_is_in_one_micro_batch_none_is_empty_and_none_too_large(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(100, 8192, 50)
    costs = tokens * 1e-6 + tokens.astype(float) ** 2 * 1e-10
    for ranks, micro_steps in ((2, 3), (8, 2), (5, 10), (1, 50)):
        cap = max(8192, int(1.15 * tokens.sum() / (ranks * micro_steps)))
        found = share(costs, tokens.tolist(), ranks, micro_steps, cap)
        assert flat(found) == list(range(50))
        assert [len(rank) for rank in found] == [micro_steps] * ranks
        assert all(micro and tokens[micro].sum() <= cap for rank in found for micro in rank)
        assert found == share(costs, tokens.tolist(), ranks, micro_steps, cap)


def test_a_long_sample_s_micro_step_is_filled_up_on_the_other_ranks():
    found = share([10.0, *[1.0] * 14], [1] * 15, 2, 2, 100)
    assert step_seconds(found, [10.0, *[1.0] * 14]) == 12  # the sum of all, over two ranks


def test_shares_are_close_to_the_best_there_are():
    for seed in range(5):
        costs = np.random.default_rng(seed).random(7) ** 2
        best = np.inf
        for where in itertools.product(range(4), repeat=7):
            loads = np.bincount(where, costs, 4).reshape(2, 2)
            best = min(best, loads.max(0).sum() if len(set(where)) == 4 else np.inf)
        assert step_seconds(share(costs, [1] * 7, 2, 2, 7), costs) <= 4 / 3 * best  # what LPT promises


def test_what_is_tight_in_memory_is_shared_by_tokens_and_what_does_not_fit_is_none():
    tokens = [60, 60, 40, 40]  # by costs the two of 60 would meet
    found = share([1.0, 1.0, 9.0, 9.0], tokens, 2, 1, 100)
    assert sorted(sorted(tokens[n] for n in rank[0]) for rank in found) == [[40, 60], [40, 60]]
    assert share([1.0] * 3, [60, 60, 60], 2, 1, 100) is None
    assert share([1.0] * 3, [1] * 3, 2, 2, 100) is None


# -- batches ----------------------------------------------------------------------------------------------------------


def lengths_of(count: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(count) < 0.5, rng.integers(256, 4096, count), rng.integers(16384, 40000, count)).tolist()


def batches(count: int = 103, **changes) -> BalancedBatches:
    values = {"batch": 16, "micro_steps": 2, "world": 4, "max_tokens": 80_000, "budget": 4096, **changes}
    return BalancedBatches(lengths_of(count), TABLE, **values)


@pytest.mark.parametrize("count", [8, 16, 96, 103, 104])
def test_every_sample_is_given_once_an_epoch_whatever_is_left(count):
    every = [list(batches(count, rank=rank)) for rank in range(4)]
    assert sorted(n for rank in every for micro in rank for n in micro) == list(range(count))
    assert all(len(rank) == len(batches(count)) for rank in every)
    assert all(micro for rank in every for micro in rank)


def test_steps_hold_the_samples_that_they_would_hold_and_cost_alike_on_all_ranks():
    mine = batches()
    order = np.random.default_rng((0, 0)).permutation(103)
    costs = sample_seconds(TABLE, mine.lengths, np.full(103, 4096.0), float(mine.lengths.mean()))
    random, balanced = 0.0, 0.0
    for step in range(mine.steps):
        samples = order[16 * step : 16 * (step + 1)] if step < mine.steps - 1 else order[16 * step :]
        plan = mine.plan(0, step)
        assert flat(plan) == sorted(samples.tolist())
        balanced += step_seconds(plan, costs)
        parts = np.array_split(samples, 8)
        random += step_seconds([[parts[2 * r + m].tolist() for m in range(2)] for r in range(4)], costs)
    assert balanced < 0.8 * random


def test_micro_batches_that_follow_each_other_through_a_pipeline_cost_alike():
    """One rank: every micro-batch of a step waits for the dearest one, as far as no sample is dearer than the mean."""
    mine = batches(640, world=1, batch=32, micro_steps=8, max_tokens=200_000)
    cost = sample_seconds(TABLE, mine.lengths, np.full(640, 4096.0), float(mine.lengths.mean()))
    fixed, tuned, random = [], [], []
    rng = np.random.default_rng(0)
    for step in range(mine.steps):
        plan = mine.plan(0, step)
        dearest = max(cost[n] for micro in plan[0] for n in micro)
        seconds = np.array([[cost[micro].sum() for micro in plan[0]]])
        assert dearest < seconds.mean()
        fixed.append(imbalance(seconds, "pipeline")[0])
        random.append(imbalance(cost[rng.permutation(flat(plan)).reshape(1, 8, 4)].sum(-1), "pipeline")[0])
        attention, rest, _ = micro_batches(TABLE, plan, mine.lengths, BUDGETS)
        everything = np.zeros((1, 8, 4), int), np.full((1, 8, 4), 3)
        chosen = tune(attention, rest, *everything, replace(TUNING, waits="pipeline"))
        tuned.append(imbalance(micro_batch_seconds(attention, rest, chosen), "pipeline")[0])
    assert np.mean(random) > 1.6
    assert np.mean(fixed) < 1.15
    assert np.mean(tuned) < np.mean(fixed)


def test_epochs_differ_and_each_begins_when_the_one_before_ends():
    mine = batches()
    one, two = list(mine), list(mine)
    assert one != two
    assert sorted(n for micro in one for n in micro) != sorted(n for micro in two for n in micro)
    again = batches()
    again.set_epoch(1)
    assert list(again) == two


@pytest.mark.parametrize("done", [0, 1, 5, 6, 8])
def test_a_resumed_run_reads_what_is_left_even_if_averages_moved(done):
    whole, expected = [], Expected(TUNING, 4)
    mine = batches(budget=None, expected=expected)
    state, saved = None, None
    loader = iter(itertools.chain.from_iterable(iter(mine) for _ in range(2)))
    for step in range(2 * mine.steps):
        if step == done:
            state, saved = mine.state_dict(), expected.state_dict()
            rest_from = len(whole)
        whole += [next(loader) for _ in range(2)]
        expected.end_step([1000 * (step + 1), 30_000], [1024, 8192 >> step % 3])
    resumed = Expected(TUNING, 4)
    resumed.load_state_dict(json.loads(json.dumps(saved)))
    again = batches(budget=None, expected=resumed)
    again.load_state_dict(json.loads(json.dumps(state)))
    loader, rest = iter(itertools.chain.from_iterable(iter(again) for _ in range(2))), []
    for step in range(done, 2 * mine.steps):
        rest += [next(loader) for _ in range(2)]
        resumed.end_step([1000 * (step + 1), 30_000], [1024, 8192 >> step % 3])
    assert rest == whole[rest_from:]


def test_plans_do_not_depend_on_how_early_a_rank_asks():
    late, early = Expected(TUNING, 4), Expected(TUNING, 4)
    one, two = batches(budget=None, expected=late, ahead=2), batches(budget=None, expected=early, ahead=2)
    asked = [two.plan(0, 0), two.plan(0, 1), two.plan(0, 2)]
    for step in range(3):
        assert one.plan(0, step) == asked[step]
        for each in (late, early):
            each.end_step([3000, 30_000], [8192, 1024])
    with pytest.raises(EffpassError, match=r"what 4 steps showed, and 3 are done"):
        two.plan(1, 0)


def test_it_is_a_batch_sampler_of_any_map_style_dataset():
    sizes = lengths_of(103)
    dataset = [{"input_ids": [0] * size, "number": n} for n, size in enumerate(sizes)]
    loader = DataLoader(dataset, batch_sampler=batches(rank=1), collate_fn=lambda rows: [r["number"] for r in rows])
    assert list(loader) == list(batches(rank=1))
    assert len(loader) == len(batches())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_tokens": 20_000}, r"sample \d+ has \d+ tokens, and a micro-batch 20000 \(\d+ samples are too long\)"),
        ({"batch": 7}, r"a batch of 7 samples leaves a rank without any: 4 ranks of 2 micro-batches take 8"),
        ({"count": 7}, r"a dataset of 7 samples leaves a rank without any"),
        ({"budget": None}, "give either expected, the tuner's, or budget"),
        ({"rank": 4}, "rank: got 4 of 4"),
        ({"ahead": 64}, "ahead: got 64"),
    ],
)
def test_what_can_not_be_shared_out_is_refused(changes, says):
    with pytest.raises(EffpassError, match=says):
        batches(**changes)


def test_a_step_that_does_not_fit_and_a_state_of_another_run_are_named():
    with pytest.raises(EffpassError, match=r"step 1 of epoch 0: 16 samples of \d+ tokens do not fit into 4 x 2"):
        list(batches(max_tokens=40_000))
    with pytest.raises(EffpassError, match=r"the checkpoint's seed is 1, and this run's 0"):
        batches().load_state_dict(batches(seed=1).state_dict())
