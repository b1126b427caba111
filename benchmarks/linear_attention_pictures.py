"""``python -m benchmarks.linear_attention_pictures PICTURE [--rows FILE]``: loss by position, and recall by load.

Read from the rows of the cases `pretraining` and `recall-…`; of rows of the same form and position or load, the last
counts. A line is the mean over the seeds, the band the range between them.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

__all__ = ["draw", "seeds"]

_COLOURS = {
    "gdn": "tab:green", "kda": "tab:blue", "fg2": "tab:orange", "fg2+": "tab:red", "window": "tab:gray",
    "attention": "black",
}  # fmt: skip
# Metric, or end of the case → what stands on the horizontal axis.
_POSITION = re.compile(r"loss of tokens \d+ to (\d+)$")
_LOAD = re.compile(r"(\d+) pairs in \d+ tokens, heads of (\d+)$")


def seeds(note: str) -> list[float]:
    """What each seed reached, from a row's note."""
    return [float(x) for x in note.removeprefix("seeds ").partition(";")[0].partition(", spread")[0].split(", ")]


def draw(rows: Path, picture: Path) -> None:
    """Write the picture.

    Raises:
        SystemExit: there are no rows of these cases.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses: dict[str, dict[int, list[float]]] = {form: {} for form in _COLOURS}
    recalls: dict[str, dict[tuple[int, int], list[float]]] = {form: {} for form in _COLOURS}
    for entry in map(json.loads, rows.read_text().splitlines()):
        form, _, rest = entry["case"].partition(", ")
        if position := _POSITION.match(entry["metric"]):
            losses[form][int(position[1])] = seeds(entry["note"])
        elif entry["metric"] == "recall" and (load := _LOAD.match(rest)):
            recalls[form][int(load[2]), int(load[1])] = seeds(entry["note"])
    loads = sorted({load for of_form in recalls.values() for load in of_form})
    if not loads and not any(losses.values()):
        raise SystemExit(f"linear_attention_pictures: {rows} has no rows of pretraining or recall")
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for form in _COLOURS:
        _line(left, form, losses[form])
        _line(right, form, {loads.index(load): found for load, found in recalls[form].items()})
    left.set_xscale("log", base=2)
    left.set(title="held-out text", xlabel="range of positions, up to", ylabel="loss, bits a byte")
    right.set_xticks(range(len(loads)), [f"{pairs}, {channels}" for channels, pairs in loads])
    right.set(title="recall", xlabel="pairs, channels of a head", ylabel="values recalled, %")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(picture, dpi=110)


def _line(axis: Any, form: str, points: dict[int, list[float]]) -> None:
    if not points:
        return
    places, found = zip(*sorted(points.items()), strict=True)
    axis.plot(places, [sum(x) / len(x) for x in found], color=_COLOURS[form], marker=".", linewidth=1.2, label=form)
    low, high = [min(x) for x in found], [max(x) for x in found]
    axis.fill_between(places, low, high, color=_COLOURS[form], alpha=0.2, linewidth=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_attention_pictures", description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--rows", type=Path, default=Path(__file__).parent / "results" / "linear_attention.jsonl")
    arguments = parser.parse_args()
    draw(arguments.rows, arguments.picture)
