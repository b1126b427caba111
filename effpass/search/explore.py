"""Which recipe to measure next, and when nothing more is promised.

A recipe promises what the cost model predicts for it, corrected by what was measured. The corrections are fitted to all
measured recipes by least squares,

    log(measured / predicted) = c + Σ over its choices of (c_pass x_choice + c_choice)

with a prior of no correction, stronger for choices: one that nobody has measured has that of its pass. A pass may be
off by a factor, x = 1, or by a share of what it gains, x = log(predicted alone / predicted without); of the two, the
promise is the better one.

The recipe that promises most is next; before one of several choices, each of them alone, since that rules out all that
hold one which loses too much. A recipe that holds another one whose loss is over the limit, by more than the loss's
standard error, is not looked at: leaving out more loses no less. The search ends when no recipe promises to come near
the best one.

Everything follows from what was measured, so that a search goes on where it was stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import TypeAlias

import numpy as np

from effpass.search.choices import Choice
from effpass.search.measure import Trial
from effpass.search.predict import Estimate
from effpass.search.recipes import DENSE, Candidate
from effpass.search.workload import Goal

__all__ = ["Trials", "added_loss", "best", "frontier", "holding", "next_candidate", "promises", "quality_loss"]

Trials: TypeAlias = "Mapping[Candidate, Trial]"

# What a promise may be worse than the best measured recipe and still be looked at: promises are that far off.
_MARGIN = 0.02
# Share of the dense model's figure below which a gain is none: no reason to lose anything.
_LEAST_GAIN = 0.01
# Weights of the priors against one measurement's.
_PASS_PRIOR, _CHOICE_PRIOR = 0.01, 0.15


def added_loss(trials: Trials, candidate: Candidate, *, confirmed: bool = False) -> tuple[float, float]:
    """Nats a token more than the dense model, and the standard error over sequences."""
    name = "confirmed" if confirmed else "losses"
    pairs = zip(getattr(trials[candidate], name), getattr(trials[DENSE], name), strict=True)
    differences = [ours - dense for ours, dense in pairs]
    return mean(differences), stdev(differences) / math.sqrt(len(differences))


def quality_loss(trials: Trials, candidate: Candidate, *, confirmed: bool = False) -> float:
    """By what share the perplexity is higher than the dense model's."""
    return math.expm1(added_loss(trials, candidate, confirmed=confirmed)[0])


def holding(trials: Trials, limit: float) -> list[Candidate]:
    """The measured candidates whose loss is within the limit; the dense model's always is."""
    measured = [candidate for candidate, trial in trials.items() if trial.is_measured]
    return [c for c in measured if c == DENSE or quality_loss(trials, c) <= limit]


def best(trials: Trials, goal: Goal, limit: float, among: Sequence[Candidate] | None = None) -> Candidate:
    """The candidate that serves the goal best within the limit; of equals the one with the fewest passes.

    The dense model, where no other gains a hundredth.
    """
    found = holding(trials, limit) if among is None else among
    enough = (1 - _LEAST_GAIN) * trials[DENSE].of(goal)
    gaining = [candidate for candidate in found if trials[candidate].of(goal) <= enough]
    return min(gaining, key=lambda candidate: (trials[candidate].of(goal), len(candidate.choices)), default=DENSE)


def frontier(trials: Trials, goal: Goal) -> list[Candidate]:
    """The measured candidates that no other beats in both the goal and the loss, the best in the goal first."""
    measured = [candidate for candidate, trial in trials.items() if trial.is_measured]
    found: list[Candidate] = []
    least = math.inf
    for candidate in sorted(measured, key=lambda c: (trials[c].of(goal), quality_loss(trials, c))):
        loss = quality_loss(trials, candidate)
        if loss < least:
            found.append(candidate)
            least = loss
    return found


def next_candidate(
    candidates: Sequence[Candidate],
    predicted: Mapping[Candidate, Estimate],
    trials: Trials,
    goal: Goal,
    limit: float,
) -> Candidate | None:
    """What to measure now; None when nothing more is promised.

    Args:
        candidates: every legal recipe.
        predicted: by the cost model, of each.
        trials: what was measured, and what was refused.
        goal: of the search.
        limit: share by which the perplexity may grow.
    """
    if DENSE not in trials:
        return DENSE
    ruled_out = [candidate for candidate in trials if _loses_too_much(trials, candidate, limit)]
    open_ = [c for c in candidates if c not in trials and not any(c.holds(other) for other in ruled_out)]
    if not open_:
        return None
    promised = promises(open_, predicted, trials, goal)
    chosen = min(open_, key=promised.__getitem__)
    if promised[chosen] > trials[best(trials, goal, limit)].of(goal) * (1 + _MARGIN):
        return None
    alone = [c for c in open_ if len(c.choices) == 1 and c != chosen and chosen.holds(c)]
    return min(alone, key=promised.__getitem__, default=chosen)


def _loses_too_much(trials: Trials, candidate: Candidate, limit: float) -> bool:
    """For what leaves out more to lose too much as well; so does what is not measured."""
    if not trials[candidate].is_measured:
        return True
    loss, error = added_loss(trials, candidate)
    return loss - error > math.log1p(limit)


def promises(
    candidates: Sequence[Candidate], predicted: Mapping[Candidate, Estimate], trials: Trials, goal: Goal
) -> dict[Candidate, float]:
    """What each candidate should measure, by the cost model and what was measured already."""
    gains = {c.choices[0]: predicted[c].of(goal) for c in predicted if len(c.choices) == 1}
    gains = {choice: math.log(alone / predicted[DENSE].of(goal)) for choice, alone in gains.items()}
    by_factor, by_share = (_promises(candidates, predicted, trials, goal, amount) for amount in ({}, gains))
    return {candidate: min(by_factor[candidate], by_share[candidate]) for candidate in candidates}


def _promises(
    candidates: Sequence[Candidate],
    predicted: Mapping[Candidate, Estimate],
    trials: Trials,
    goal: Goal,
    amount: Mapping[Choice, float],
) -> dict[Candidate, float]:
    """Promises by one fit; `amount` is x of choices, 1 for those that it does not name."""

    def terms(candidate: Candidate) -> dict[tuple[str, str], float]:
        found = {("pass", choice.name): amount.get(choice, 1.0) for choice in candidate.choices}
        return found | {("choice", choice.label): 1.0 for choice in candidate.choices}

    measured = [candidate for candidate, trial in trials.items() if trial.is_measured]
    names = list(dict.fromkeys(name for candidate in measured for name in terms(candidate)))
    rows = [[1.0, *(terms(candidate).get(name, 0.0) for name in names)] for candidate in measured]
    logs = [math.log(trials[c].of(goal) / predicted[c].of(goal)) for c in measured]
    prior = np.diag([0.0, *(_PASS_PRIOR if kind == "pass" else _CHOICE_PRIOR for kind, _ in names)])
    matrix, right = np.vstack([np.array(rows), prior]), np.concatenate([logs, np.zeros(len(prior))])
    whole, *found = np.linalg.lstsq(matrix, right, rcond=None)[0]
    of_name = dict(zip(names, found, strict=True))
    return {
        candidate: predicted[candidate].of(goal)
        * math.exp(whole + sum(x * of_name.get(name, 0.0) for name, x in terms(candidate).items()))
        for candidate in candidates
    }
