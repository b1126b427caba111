"""``python -m benchmarks.training_plot CURVES PICTURE``: loss over steps and over time, and the gap over model size.

A line is the mean over the seeds of a method at its best rate, the band the range between the seeds. Time is the step's
time measured alone, where the rows are given (``--rows FILE``), and else the time that the run took.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.training_runs import Result, finished

__all__ = ["draw"]

_COLOURS = {"AdamW": "tab:gray", "Muon": "tab:blue", "MONA": "tab:red", "torch.optim.Muon": "tab:cyan"}


def draw(curves: Path, rows: Path | None, picture: Path) -> None:
    """Write the picture.

    Raises:
        SystemExit: no run in `curves` came to its end.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = finished(curves)
    if not results:
        raise SystemExit(f"training_plot: no run in {curves} came to its end")
    studies = list(dict.fromkeys(result.study for result in results))
    best = {study: _best([r for r in results if r.study == study]) for study in studies}
    figure = Figure(figsize=(4 * (len(studies) + 1), 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(studies) + 1, squeeze=False)
    step_times = _step_times(rows)
    for column, study in enumerate(studies):
        for method, own in best[study].items():
            points = _points(curves, own)
            steps = sorted(set.intersection(*(set(p) for p in points)))
            losses = np.array([[p[step][0] for step in steps] for p in points])
            each = step_times.get((study, method))
            seconds = [each * s if each else float(np.mean([p[s][1] for p in points])) for s in steps]
            for axis, x in zip(axes[:, column], (steps, seconds), strict=True):
                axis.plot(x, losses.mean(0), color=_COLOURS[method], linewidth=1.2, label=f"{method} {own[0].rate:g}")
                axis.fill_between(x, losses.min(0), losses.max(0), color=_COLOURS[method], alpha=0.2, linewidth=0)
        top, bottom = axes[:, column]
        seeds = sorted({len(own) for own in best[study].values()})
        top.set(
            title=f"{study}, {'/'.join(map(str, seeds))} seeds", xlabel="step", ylabel="training loss, nats a token"
        )
        bottom.set(xlabel="seconds", ylabel="training loss, nats a token")
        for axis in (top, bottom):
            axis.set_yscale("log")
            axis.grid(alpha=0.3, which="both")
            axis.legend(fontsize=7)
    _gaps(axes[0, -1], studies, best)
    axes[1, -1].axis("off")
    figure.savefig(picture, dpi=110)


def _best(results: list[Result]) -> dict[str, list[Result]]:
    """Each method's runs at the rate that did best with seed 0."""
    found = {}
    for method in dict.fromkeys(result.method for result in results):
        own = [result for result in results if result.method == method]
        rate = min((r for r in own if r.seed == 0), key=lambda result: result.loss).rate
        found[method] = [result for result in own if result.rate == rate]
    return found


def _points(curves: Path, runs: list[Result]) -> list[dict[int, tuple[float, float]]]:
    """Step → (loss, seconds) of each run."""
    wanted = {(r.study, r.method, r.rate, r.seed): i for i, r in enumerate(runs)}
    found: list[dict[int, tuple[float, float]]] = [{} for _ in runs]
    for line in curves.read_text().splitlines():
        try:
            entry: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        number = wanted.get(tuple(entry.get(key) for key in ("study", "method", "rate", "seed")))  # type: ignore[call-overload]
        if number is not None and "step" in entry:
            found[number][entry["step"]] = entry["loss"], entry["seconds"]
    return found


def _step_times(rows: Path | None) -> dict[tuple[str, str], float]:
    """(study, method) → seconds of a step alone, from the rows."""
    found = {}
    for line in rows.read_text().splitlines() if rows is not None else ():
        entry = json.loads(line)
        if entry["metric"].startswith("step in training, "):
            found[entry["case"], entry["metric"].removeprefix("step in training, ")] = entry["ours"] / 1e3
    return found


def _gaps(axis: Any, studies: list[str], best: dict[str, dict[str, list[Result]]]) -> None:
    """Held-out loss minus AdamW's with the same seed, over the studies."""
    for method in ("Muon", "MONA"):
        heights, low, high = [], [], []
        for study in studies:
            adamw = {r.seed: r.loss for r in best[study].get("AdamW", [])}
            gaps = [r.loss - adamw[r.seed] for r in best[study].get(method, []) if r.seed in adamw] or [np.nan]
            heights.append(np.mean(gaps))
            low.append(heights[-1] - min(gaps))
            high.append(max(gaps) - heights[-1])
        axis.errorbar(studies, heights, [low, high], color=_COLOURS[method], marker="o", capsize=3, label=method)
    axis.axhline(0, color=_COLOURS["AdamW"], linewidth=0.8)
    axis.set(title="gap to AdamW, best rates", ylabel="held-out loss minus AdamW's, nats")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_plot", description=__doc__)
    parser.add_argument("curves", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--rows", type=Path)
    arguments = parser.parse_args()
    draw(arguments.curves, arguments.rows, arguments.picture)
