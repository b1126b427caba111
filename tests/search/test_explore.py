"""Which recipe is measured next: on made-up worlds, against measuring everything."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest

from effpass.search.choices import Choice
from effpass.search.explore import added_loss, best, frontier, holding, next_candidate, promises, quality_loss
from effpass.search.measure import Trial
from effpass.search.predict import Estimate
from effpass.search.recipes import DENSE, Candidate

LIMIT = 0.01


def choice(name: str, rung: int) -> Choice:
    return Choice(name, f"{name} {rung}", {})


def trial(seconds: float, loss: float) -> Trial:
    """Two sequences of text, which lose a little more and a little less."""
    return Trial("measured", step_seconds=seconds, tokens_per_second=1 / seconds, losses=[1 + loss, 2 + loss])


class World:
    """Three passes of three rungs each: a higher rung makes steps shorter and loses more; losses add up.

    The cost model is off by up to a half, and differently for each pass.
    """

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.gain = {(p, r): rng.uniform(0.02, 0.12) * r for p in "abc" for r in (1, 2, 3)}
        self.loss = {(p, r): rng.uniform(0, 0.004) * r**2 for p in "abc" for r in (1, 2, 3)}
        self.wrong = {p: rng.uniform(0.67, 1.5) for p in "abc"}
        self.refuses = rng.random() < 0.3 and frozenset(rng.sample("abc", 2))
        self.rng = rng
        rungs = [[choice(p, r) for r in (1, 2, 3)] for p in "abc"]
        sets = [c for count in (0, 1, 2, 3) for c in combinations([x for rung in rungs for x in rung], count)]
        self.candidates = [Candidate(c) for c in sets if len({x.name for x in c}) == len(c)]
        self.truth = {candidate: self._measured(candidate) for candidate in self.candidates}
        self.predicted = {candidate: self._predicted(candidate) for candidate in self.candidates}

    def _parts(self, candidate: Candidate) -> list[tuple[str, int]]:
        return [(c.name, int(c.label.split()[1])) for c in candidate.choices]

    def _measured(self, candidate: Candidate) -> Trial:
        parts = self._parts(candidate)
        if self.refuses and self.refuses <= {p for p, _ in parts}:
            return Trial("refused", "these two don't stand together")
        seconds = math.prod(1 - self.gain[part] for part in parts) * self.rng.uniform(0.99, 1.01)
        return trial(seconds, sum(self.loss[part] for part in parts))

    def _predicted(self, candidate: Candidate) -> Estimate:
        return Estimate(math.prod(1 - self.gain[p, r] * self.wrong[p] for p, r in self._parts(candidate)) / 3, 1.0)

    def explore(self) -> dict[Candidate, Trial]:
        trials: dict[Candidate, Trial] = {}
        while (candidate := next_candidate(self.candidates, self.predicted, trials, "latency", LIMIT)) is not None:
            assert candidate not in trials
            trials[candidate] = self.truth[candidate]
        return trials


@pytest.mark.parametrize("seed", range(60))
def test_within_five_percent_of_measuring_everything(seed):
    world = World(seed)
    trials = world.explore()
    found = best(trials, "latency", LIMIT)
    everything = world.truth[best(world.truth, "latency", LIMIT)].step_seconds
    assert quality_loss(trials, found) <= LIMIT
    assert trials[found].step_seconds <= 1.05 * everything
    assert len(world.candidates) == 64


def test_most_recipes_need_no_measuring():
    counts = [len(World(seed).explore()) for seed in range(60)]
    assert max(counts) <= 32
    assert sum(counts) / len(counts) < 16


def test_the_dense_model_comes_first():
    world = World(0)
    assert next_candidate(world.candidates, world.predicted, {}, "latency", LIMIT) == DENSE


def test_one_pass_alone_before_several():
    world = World(1)
    trials = {DENSE: world.truth[DENSE]}
    first = next_candidate(world.candidates, world.predicted, trials, "latency", LIMIT)
    assert len(first.choices) == 1
    assert min(world.predicted, key=lambda c: world.predicted[c].seconds).holds(first)


def test_what_holds_a_recipe_that_lost_too_much_is_not_looked_at():
    a, b = Candidate((choice("a", 1),)), Candidate((choice("b", 1),))
    both = Candidate((*a.choices, *b.choices))
    predicted = {DENSE: Estimate(1, 1), a: Estimate(0.5, 1), b: Estimate(0.9, 1), both: Estimate(0.4, 1)}
    for lost in (trial(0.5, 0.02), Trial("refused", "no"), Trial("failed", "no memory")):
        trials = {DENSE: trial(1, 0), a: lost}
        assert next_candidate(list(predicted), predicted, trials, "latency", LIMIT) == b
        trials[b] = trial(0.9, 0)
        assert next_candidate(list(predicted), predicted, trials, "latency", LIMIT) is None


def test_promises_are_corrected_by_what_was_measured():
    a, b = Candidate((choice("a", 1),)), Candidate((choice("b", 1),))
    both = Candidate((*a.choices, *b.choices))
    predicted = {DENSE: Estimate(1, 1), a: Estimate(0.8, 1), b: Estimate(0.9, 1), both: Estimate(0.72, 1)}
    trials = {DENSE: trial(10, 0), a: trial(12, 0)}  # ten times as slow as predicted, and `a` slower than dense
    promised = promises([both, b], predicted, trials, "latency")
    assert promised[b] == pytest.approx(9, rel=0.02)
    assert promised[both] == pytest.approx(10.8, rel=0.02)


def test_a_gain_below_a_hundredth_is_none():
    a = Candidate((choice("a", 1),))
    assert best({DENSE: trial(1, 0), a: trial(0.995, 0)}, "latency", LIMIT) == DENSE
    assert best({DENSE: trial(1, 0), a: trial(0.98, 0)}, "latency", LIMIT) == a


def test_losses_are_compared_sequence_by_sequence():
    a = Candidate((choice("a", 1),))
    trials = {DENSE: trial(1, 0), a: trial(0.5, 0.05)}
    assert added_loss(trials, a) == pytest.approx((0.05, 0))
    assert quality_loss(trials, a) == pytest.approx(math.exp(0.05) - 1)
    assert holding(trials, 0.01) == [DENSE]
    assert holding(trials, 0.06) == [DENSE, a]


def test_the_frontier_is_what_none_beats_in_both():
    a, b, c = (Candidate((choice(name, 1),)) for name in "abc")
    trials = {DENSE: trial(1, 0), a: trial(0.5, 0.05), b: trial(0.7, 0.06), c: trial(0.8, 0.01)}
    assert frontier(trials, "latency") == [a, c, DENSE]
