"""A plot of all measured recipes of a search: the goal against the quality loss, with the Pareto frontier."""

from __future__ import annotations

import os
import uuid
from importlib.util import find_spec
from pathlib import Path

from effpass.search.explore import Trials, frontier, quality_loss
from effpass.search.recipes import Candidate
from effpass.search.workload import Goal

__all__ = ["AXES", "can_plot", "plot"]

# Axis label of each goal, and the factor from `Trial.of(goal)` to the unit of the label.
AXES: dict[Goal, tuple[str, float]] = {
    "latency": ("ms a step", 1e3),
    "memory": ("MB of weights and cache", 1e-6),
    "throughput": ("ms a token, prompts included", 1e3),
}


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def plot(trials: Trials, goal: Goal, limit: float, chosen: Candidate, path: Path) -> None:
    """Draw the measured recipes, their Pareto frontier, the limit and the chosen recipe as a PNG, written atomically.

    Args:
        trials: measurements so far, by candidate.
        goal: quantity that the search minimizes.
        limit: largest relative increase of the perplexity.
        chosen: recipe to highlight.
        path: file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    name, factor = AXES[goal]
    measured = [candidate for candidate, trial in trials.items() if trial.is_measured]
    best = frontier(trials, goal)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()

    def at(candidates: list[Candidate]) -> tuple[list[float], list[float]]:
        return (
            [100 * quality_loss(trials, candidate) for candidate in candidates],
            [factor * trials[candidate].of(goal) for candidate in candidates],
        )

    axes.plot(*at(measured), "o", color="0.6", markersize=5, label="measured")
    axes.plot(*at(sorted(best, key=lambda c: quality_loss(trials, c))), "o-", linewidth=1, label="not beaten in both")
    axes.plot(*at([chosen]), "*", markersize=16, label=f"chosen: {chosen.key}")
    axes.axvline(100 * limit, linestyle="--", linewidth=1, color="0.4", label=f"limit: {100 * limit:g} %")
    for candidate in best:
        (x,), (y,) = at([candidate])
        axes.annotate(candidate.key, (x, y), textcoords="offset points", xytext=(6, 4), fontsize=7)
    if max(at(measured)[0]) > 20 * max(1.0, 100 * limit):
        axes.set_xscale("symlog", linthresh=max(1.0, 100 * limit))
    axes.set(xlabel="perplexity above the dense model's, %", ylabel=name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.png")
    try:
        figure.savefig(temporary, dpi=110)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
