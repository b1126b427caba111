"""Decides which recipe to measure next, and when the search ends.

:mod:`effpass.search.run` measures what :func:`next_candidate` returns until that is None. The search minimizes a goal
(time or memory) among the recipes whose perplexity exceeds that of the dense model, which has no pass, by no more than
a limit. A recipe consists of *choices*, each of which is one pass with one set of options.

The *promise* of a recipe is the goal value that the cost model predicts for it, corrected by what was measured so far.
The corrections are fitted to all measured recipes by least squares,

    log(measured / predicted) = c + Σ over its choices of (c_pass · x_choice + c_choice)

where c is common to all recipes, c_pass to all choices of a pass, and c_choice belongs to one choice. A prior draws
c_pass and c_choice towards zero, c_choice more strongly, so that a choice that was never measured takes the correction
of its pass. The prediction of a pass may be wrong by a constant factor, x = 1, or by a share of its predicted gain,
x = log(predicted for the choice alone / predicted for the dense model). Both fits are made, and the promise is the
smaller (better) of the two results.

The recipe with the best promise is measured next. If it combines several choices, those that can still be measured
alone are measured first, because a choice that loses too much rules out all recipes that contain it. In general, a
recipe is ruled out when it contains one that was refused or failed, or one whose loss is above the limit by more than
the standard error of the loss: adding passes is assumed not to reduce the loss. The search ends when no remaining
recipe promises to come near the best measured one.

Everything follows from the measurements alone, so an interrupted search resumes where it stopped.
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

# Relative margin by which a promise may be worse than the best measured recipe and still be measured; promises are not
# more accurate than that.
_MARGIN = 0.02
# Least gain, relative to the dense model, that justifies a loss in quality.
_LEAST_GAIN = 0.01
# Weights of the prior's equations in the least-squares fit, in which each measurement has the weight 1.
_PASS_PRIOR, _CHOICE_PRIOR = 0.01, 0.15


def added_loss(trials: Trials, candidate: Candidate, *, confirmed: bool = False) -> tuple[float, float]:
    """Increase of the loss over the dense model in nats per token, and its standard error over the sequences.

    Args:
        trials: measurements so far, by candidate.
        candidate: measured recipe.
        confirmed: use the losses on the confirmation text instead of those on the selection text.
    """
    name = "confirmed" if confirmed else "losses"
    pairs = zip(getattr(trials[candidate], name), getattr(trials[DENSE], name), strict=True)
    differences = [ours - dense for ours, dense in pairs]
    return mean(differences), stdev(differences) / math.sqrt(len(differences))


def quality_loss(trials: Trials, candidate: Candidate, *, confirmed: bool = False) -> float:
    """Relative increase of the perplexity over the dense model's; arguments as in :func:`added_loss`."""
    return math.expm1(added_loss(trials, candidate, confirmed=confirmed)[0])


def holding(trials: Trials, limit: float) -> list[Candidate]:
    """The measured candidates whose quality loss is within the limit; the dense model always is."""
    measured = [candidate for candidate, trial in trials.items() if trial.is_measured]
    return [c for c in measured if c == DENSE or quality_loss(trials, c) <= limit]


def best(trials: Trials, goal: Goal, limit: float, among: Sequence[Candidate] | None = None) -> Candidate:
    """The candidate with the best goal value among those whose quality loss is within the limit.

    Among candidates with the same value, the one with the fewest passes is preferred. If no candidate improves on the
    dense model by at least 1 %, the dense model is returned.

    Args:
        trials: measurements so far, by candidate.
        goal: quantity that the search minimizes.
        limit: largest relative increase of the perplexity.
        among: candidates to choose from; None stands for all measured ones within the limit.
    """
    found = holding(trials, limit) if among is None else among
    enough = (1 - _LEAST_GAIN) * trials[DENSE].of(goal)
    gaining = [candidate for candidate in found if trials[candidate].of(goal) <= enough]
    return min(gaining, key=lambda candidate: (trials[candidate].of(goal), len(candidate.choices)), default=DENSE)


def frontier(trials: Trials, goal: Goal) -> list[Candidate]:
    """The Pareto frontier of goal and quality loss over the measured candidates, best goal value first."""
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
    """The recipe to measure next; None when the search has ended.

    Args:
        candidates: all legal recipes.
        predicted: prediction of the cost model for each recipe.
        trials: results so far, including recipes that were refused or failed.
        goal: quantity that the search minimizes.
        limit: largest relative increase of the perplexity.
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
    """Whether all recipes that contain `candidate` are ruled out: it loses too much, was refused, or failed."""
    if not trials[candidate].is_measured:
        return True
    loss, error = added_loss(trials, candidate)
    return loss - error > math.log1p(limit)


def promises(
    candidates: Sequence[Candidate], predicted: Mapping[Candidate, Estimate], trials: Trials, goal: Goal
) -> dict[Candidate, float]:
    """The promise of each candidate: the value of the goal that its measurement is expected to give."""
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
    """Promises of one fit.

    Args:
        candidates: recipes to return promises for.
        predicted: prediction of the cost model for each recipe.
        trials: results so far.
        goal: quantity that the search minimizes.
        amount: x of each choice (see the module's docstring); 1 for choices that it lacks.
    """

    def terms(candidate: Candidate) -> dict[tuple[str, str], float]:
        found = {("pass", choice.name): amount.get(choice, 1.0) for choice in candidate.choices}
        return found | {("choice", choice.label): 1.0 for choice in candidate.choices}

    measured = [candidate for candidate, trial in trials.items() if trial.is_measured]
    names = list(dict.fromkeys(name for candidate in measured for name in terms(candidate)))
    rows = [[1.0, *(terms(candidate).get(name, 0.0) for name in names)] for candidate in measured]
    log_ratios = [math.log(trials[c].of(goal) / predicted[c].of(goal)) for c in measured]
    prior = np.diag([0.0, *(_PASS_PRIOR if kind == "pass" else _CHOICE_PRIOR for kind, _ in names)])
    matrix, right = np.vstack([np.array(rows), prior]), np.concatenate([log_ratios, np.zeros(len(prior))])
    constant, *fitted = np.linalg.lstsq(matrix, right, rcond=None)[0]
    corrections = dict(zip(names, fitted, strict=True))
    return {
        candidate: predicted[candidate].of(goal)
        * math.exp(constant + sum(x * corrections.get(name, 0.0) for name, x in terms(candidate).items()))
        for candidate in candidates
    }
