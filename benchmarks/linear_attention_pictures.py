"""``python -m benchmarks.linear_attention_pictures PICTURE [--rows FILE]``: loss by position, answers by length of a
task, and recall by load.

Read from the rows of the cases `pretraining…` and `recall-…`. Of rows of the same form and position, length or load,
the last counts, and of rows of pretraining those alone that are of the same data as the last. A task that no form
answers has no picture. A line is the mean over the seeds, the band the range between them.
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
_Lines = dict[str, dict[int, list[float]]]  # form → place → what each seed reached
# Metric, or end of the case → what stands on the horizontal axis.
_POSITION = re.compile(r"loss of tokens \d+ to (\d+)$")
_LENGTH = re.compile(r"(\w+) answered in (\d+) bytes$")
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

    entries = [json.loads(line) for line in rows.read_text().splitlines()]
    data = [_data(entry) for entry in entries if _POSITION.match(entry["metric"])]
    losses: _Lines = {}
    answers: dict[str, _Lines] = {}
    recalls: dict[str, dict[tuple[int, int], list[float]]] = {}
    for entry in entries:
        form = entry["case"].partition(", ")[0]
        if entry["metric"] == "recall" and (load := _LOAD.match(_data(entry))):
            recalls.setdefault(form, {})[int(load[2]), int(load[1])] = seeds(entry["note"])
        elif _data(entry) not in data[-1:]:
            continue
        elif position := _POSITION.match(entry["metric"]):
            losses.setdefault(form, {})[int(position[1])] = seeds(entry["note"])
        elif length := _LENGTH.match(entry["metric"]):
            answers.setdefault(length[1], {}).setdefault(form, {})[int(length[2])] = seeds(entry["note"])
    answers = {
        task: lines for task, lines in answers.items() if any(max(x) for of in lines.values() for x in of.values())
    }
    loads = sorted({load for of_form in recalls.values() for load in of_form})
    if not loads and not losses:
        raise SystemExit(f"linear_attention_pictures: {rows} has no rows of pretraining or recall")
    height = 1 + -(-len(answers) // 2)
    figure = Figure(figsize=(11, 4 * height), layout="constrained")
    FigureCanvasAgg(figure)
    left, right, *others = figure.subplots(height, 2).flat
    _panel(left, losses, title="held-out text", xlabel="range of positions, up to", ylabel="loss, bits a byte")
    left.set_xscale("log", base=2)
    by_place = {form: {loads.index(load): x for load, x in found.items()} for form, found in recalls.items()}
    _panel(right, by_place, title="recall", xlabel="pairs, channels of a head", ylabel="values recalled, %")
    right.set_xticks(range(len(loads)), [f"{pairs}, {channels}" for channels, pairs in loads])
    for axis, (task, lines) in zip(others, answers.items(), strict=False):
        _panel(axis, lines, title=f"task {task}", xlabel="length, bytes", ylabel="right answers, %")
        axis.set_xscale("log", base=2)
    for axis in others[len(answers) :]:
        axis.remove()
    figure.savefig(picture, dpi=110)


def _data(entry: dict[str, Any]) -> str:
    """What a row's case says after its form."""
    return str(entry["case"].partition(", ")[2])


def _panel(axis: Any, lines: _Lines, **words: str) -> None:
    for form, colour in _COLOURS.items():
        if form not in lines:
            continue
        places, found = zip(*sorted(lines[form].items()), strict=True)
        axis.plot(places, [sum(x) / len(x) for x in found], color=colour, marker=".", linewidth=1.2, label=form)
        low, high = [min(x) for x in found], [max(x) for x in found]
        axis.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.set(**words)
    axis.grid(alpha=0.3)
    if lines:
        axis.legend(fontsize=8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_attention_pictures", description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--rows", type=Path, default=Path(__file__).parent / "results" / "linear_attention.jsonl")
    arguments = parser.parse_args()
    draw(arguments.rows, arguments.picture)
