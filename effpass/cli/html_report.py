"""An inspection as one HTML file: no script, nothing loaded from elsewhere; light and dark, desk and phone.

:func:`page` is made from the JSON report alone, so what the page shows is what ``--json`` says.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from effpass import __version__
from effpass.cli import units
from effpass.cli.html import Markup, join, tag
from effpass.cli.html_plot import Point, roofline
from effpass.cli.html_style import STYLE
from effpass.core.errors import EffpassError
from effpass.core.whole import write_text

__all__ = ["check_writable", "page", "write_report"]

# Rows of the table of kernels; the rest are summed in a last one.
_ROWS = 12


def check_writable(file: Path, *, overwrite: bool) -> None:
    """Raise an :class:`EffpassError` when :func:`write_report` could not write `file`; before anything slow."""
    if file.is_dir():
        raise EffpassError(f"{file} is a folder", hint="name a file, such as report.html")
    if not file.parent.is_dir():
        raise EffpassError(f"the folder {file.parent} does not exist", hint="make it first, or choose another")
    if not os.access(file.parent, os.W_OK):
        raise EffpassError(f"the folder {file.parent} is not writable", hint="choose another")
    if file.exists() and not overwrite:
        raise EffpassError(f"{file} exists", hint="choose another file, or pass --overwrite")


def write_report(report: dict[str, Any], file: Path) -> None:
    """Write :func:`page` to `file`, whole or not at all."""
    write_text(file, page(report))


def page(report: dict[str, Any]) -> str:
    """The whole page.

    Args:
        report: what ``effpass inspect --json`` prints: `Inspection.to_json()` with the names of model and recipe.
    """
    title = f"{report['model']} by {report['recipe']}"
    counted = [w for w in report["workloads"] if w["stages"]]
    body = [
        _head(report),
        tag("section", tag("h2", "In short"), tag("div", *map(_card, counted), class_="cards"), *_warnings(report)),
        tag("section", tag("h2", "What the passes do"), *_passes(report)),
        *(_workload(w, report["ceilings"]) for w in counted),
        tag("section", tag("h2", "Memory"), *_memory(report["memory"])),
        tag("section", tag("h2", "How to read this"), *_explanation(report["ceilings"])),
    ]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"effpass: {title}"),
        tag("style", Markup(STYLE)),
    )
    html = tag("html", head, tag("body", tag("main", *body)), lang="en")
    return f"<!doctype html>\n{html}\n"


def _head(report: dict[str, Any]) -> Markup:
    ceilings = report["ceilings"]
    return tag(
        "header",
        tag("p", "effpass inspect", class_="kicker"),
        tag("h1", report["model"]),
        tag("p", "rewritten by ", tag("code", report["recipe"]), "; ", report["dtype"], ", predicted for ",
            tag("b", ceilings["device"])),
    )  # fmt: skip


def _call(work: dict[str, Any]) -> str:
    batch = f"batch {work['batch']:,}"
    if work["name"] == "decode":
        return f"one token, {batch}, cache of {work['cache_length']:,} positions"
    return f"{work['tokens']:,} tokens, {batch}"


def _card(work: dict[str, Any]) -> Markup:
    first, last = work["stages"][0], work["stages"][-1]
    gain = first["seconds"] / last["seconds"]
    verdict = f"{gain:.2f} times the speed" if abs(gain - 1) >= 0.005 else "no change predicted"
    return tag(
        "div",
        tag("h3", work["name"].capitalize(), " ", tag("small", _call(work))),
        tag("p", units.duration(first["seconds"]), " → ", tag("b", units.duration(last["seconds"])), class_="big"),
        tag("p", verdict, class_="gain" if gain >= 1.005 else "loss" if gain <= 0.995 else None),
        tag("p", "predicted; no schedule of these kernels can come below ", units.duration(last["bound_seconds"]),
            class_="quiet"),
        class_="card",
    )  # fmt: skip


def _warnings(report: dict[str, Any]) -> Iterator[Markup]:
    for name in report["unmet"]:
        yield tag("p", tag("b", name), " is required and would rewrite nothing.", class_="warning")
    if report["dtype"] != (measured := report["ceilings"]["dtype"]):
        words = (
            f"The weights are {report['dtype']}, and the ceilings were measured for {measured}: load it with --dtype."
        )
        yield tag("p", words, class_="warning")
    for work in report["workloads"]:
        for reason in work["missing"]:
            yield tag("p", tag("b", f"{work['name']}: "), f"not counted: {reason}", class_="warning")
        if work["uncounted"]:
            names = ", ".join(work["uncounted"])
            yield tag(
                "p", f"{work['name']}: the FLOPs of {names} are unknown; they count by bytes alone.", class_="warning"
            )


# -- passes -----------------------------------------------------------------------------------------------------------


def _passes(report: dict[str, Any]) -> Iterator[Markup]:
    merged: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for graph in report["reports"]:
        for entry in graph["passes"]:
            merged[entry["name"]].append(entry)
    in_a_step: dict[str, int] = defaultdict(int)
    for graph in report["decode_reports"]:
        for entry in graph["passes"]:
            in_a_step[entry["name"]] += entry["hits"]
    for name, entries in merged.items():
        hits = sum(entry["hits"] for entry in entries)
        kind = "exact" if entries[0]["exact"] else "approximate"
        others = "" if in_a_step[name] == hits else f", {in_a_step[name]:,} in a decode step"
        yield tag(
            "div",
            tag("h3", name, " ", tag("span", kind, class_=f"badge {kind}")),
            tag("p", tag("b", f"{hits:,}"), f" place{'s' * (hits != 1)} rewritten{others}" + _ops(entries)),
            *(tag("p", note) for note in dict.fromkeys(entry["note"] for entry in entries) if note),
            *_refusals([refusal for entry in entries for refusal in entry["refusals"]]),
            class_="pass",
        )
    for entry in report["prepared"]:
        yield tag("p", tag("b", entry["name"]), " acts on the model itself, through effpass.prepare; not traced here.")
        if entry["note"]:
            yield tag("p", entry["note"])
    yield from (tag("p", line) for line in report["changed"])
    if not merged and not report["prepared"]:
        yield tag("p", "The recipe names no pass.")


def _ops(entries: list[dict[str, Any]]) -> str:
    ops: dict[str, int] = defaultdict(int)
    for entry in entries:
        for op, change in entry["ops"].items():
            ops[op] += change
    changes = [f"{change:+,} {op.removeprefix('aten.').partition('.')[0]}" for op, change in ops.items() if change]
    return f"; operators: {', '.join(changes)}" if changes else ""


def _refusals(refusals: list[dict[str, Any]]) -> Iterator[Markup]:
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for refusal in refusals:
        groups[refusal["reason"], refusal["hint"]].append(refusal["node"])
    for (reason, hint), nodes in groups.items():
        yield tag(
            "details",
            tag("summary", f"{len(nodes):,} left alone: {reason}" + (f" → {hint}" if hint else "")),
            tag("ul", *(tag("li", tag("code", node)) for node in nodes)),
        )


# -- workloads --------------------------------------------------------------------------------------------------------


def _workload(work: dict[str, Any], ceilings: dict[str, Any]) -> Markup:
    rows = _joined(work)
    return tag(
        "section",
        tag("h2", work["name"].capitalize(), " ", tag("small", _call(work))),
        _costs(work),
        tag("h3", "Where the time goes"),
        _kernels(rows),
        tag("h3", "Roofline"),
        roofline(list(_points(rows)), ceilings, f"Roofline of {work['name']}: kernels before and after"),
        tag("p", tag("span", class_="key before"), "as loaded ", tag("span", class_="key after"), "after the passes; "
            "the area of a point is its time. The solid roof is what the device reaches, the dashed one what a"
            " matrix-vector product reads. Kernels without FLOPs are in the table only.", class_="quiet"),
        *_layer(work),
        *_formulas(work),
    )  # fmt: skip


def _costs(work: dict[str, Any]) -> Markup:
    stages = work["stages"]
    head = ["", stages[0]["name"], *(f"after {s['name']}" for s in stages[1:]), *(["change"] if stages[1:] else [])]
    body = []
    for label, key, shown in units.COSTS:
        change = [units.percent(stages[0][key], stages[-1][key])] if stages[1:] else []
        body.append([label, *(shown(stage[key]) for stage in stages), *change])
    return _table(head, body, caption="Costs of one call")


def _table(head: list[Any], body: list[list[Any]], *, caption: str) -> Markup:
    """The first column names the row."""
    rows = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in body]
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption),
            tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head))),
            tag("tbody", *rows),
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption,
    )


def _joined(work: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows before and after, side by side where the same kernels are on both."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for when in ("before", "after"):
        for row in work[when]:
            key = (row["name"], row["kind"], tuple(row["operators"]))
            rows.setdefault(key, {"row": row})[when] = row
    return sorted(rows.values(), key=lambda r: -max(r[when]["seconds"] for when in ("before", "after") if when in r))


def _kernels(rows: list[dict[str, Any]]) -> Markup:
    totals = [sum(r[when]["seconds"] for r in rows if when in r) for when in ("before", "after")]
    longest = max(found[when]["seconds"] for found in rows for when in ("before", "after") if when in found)
    body = []
    for found in rows[:_ROWS]:
        row = found["row"]
        numbers = [found[when]["count"] if when in found else 0 for when in ("before", "after")]
        name = tag("span", _module(row["name"]), tag("small", f"{_number(*numbers)} {_what(row)}"))
        times = [found[when]["seconds"] if when in found else 0.0 for when in ("before", "after")]
        body.append([name, *(units.duration(t) if t else "–" for t in times), _bars(times, totals, longest)])  # noqa: RUF001
    if rest := rows[_ROWS:]:
        times = [sum(r[w]["seconds"] for r in rest if w in r) for w in ("before", "after")]
        body.append([f"{len(rest)} others", *map(units.duration, times), ""])
    return _table(
        ["kernels", "time before", "after", tag("span", "compared", class_="wide")],
        body,
        caption="Kernels, equal layers together",
    )


def _module(name: str) -> Markup:
    """A long name may break after its dots."""
    return tag("code", Markup("<wbr>".join(join([part]) for part in re.split(r"(?<=\.)", name or "the model"))))


def _number(before: int, after: int) -> str:
    return f"{before or after:,} x" if before == after or not before or not after else f"{before:,} → {after:,} x"


def _operators(row: dict[str, Any]) -> list[str]:
    """Without changes of dtype, which tell nothing and are everywhere."""
    return [name for name in row["operators"] if name != "to"] or row["operators"]


def _what(row: dict[str, Any]) -> str:
    names = _operators(row)
    return f"{row['kind']}: {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"


def _bars(times: list[float], totals: list[float], longest: float) -> Markup:
    """Lengths in proportion to `longest`."""
    shares = [time / total for time, total in zip(times, totals, strict=True)]
    words = f"{shares[0]:.0%} of the time before, {shares[1]:.0%} after"
    bars = (
        tag("rect", x=0, y=y, width=f"{100 * time / longest:.2f}", height=5, class_=f"bar {when}")
        for time, y, when in zip(times, (1, 8), ("before", "after"), strict=True)
    )
    return tag(
        "svg", *bars, viewBox="0 0 100 14", preserveAspectRatio="none", role="img", aria_label=words, class_="bars"
    )


def _points(rows: list[dict[str, Any]]) -> Iterator[Point]:
    for found in rows:
        for when in ("before", "after"):
            if when in found:
                row = found[when]
                yield Point(row["name"] or "the model", when, row["flops"], row["bytes"], row["seconds"])


def _formulas(work: dict[str, Any]) -> Iterator[Markup]:
    if "batch" not in work["flops_formula"]:
        return
    yield tag("h3", "At any size")
    yield tag("p", "FLOPs = ", tag("code", units.formula(work["flops_formula"])))
    yield tag("p", "bytes = ", tag("code", units.formula(work["bytes_formula"])))


# -- one layer --------------------------------------------------------------------------------------------------------


def _layer(work: dict[str, Any]) -> Iterator[Markup]:
    layer = work["layer"]
    if layer is None:
        return
    before, after = layer["before"], layer["after"]
    yield tag("h3", "One layer, kernel by kernel")
    yield tag("p", " → ".join(work["outline"]), class_="outline")
    yield tag("p", f"{layer['stack']}.{layer['index']}, one of {layer['alike']} alike among {layer['count']}: "
              f"{len(before)} kernels as loaded, {len(after)} after the passes.")  # fmt: skip
    steps = [tag("li", tag("div", "as loaded"), tag("div", "after the passes"), class_="heads", aria_hidden="true")]
    matcher = SequenceMatcher(None, [*map(repr, before)], [*map(repr, after)], autojunk=False)
    for _, i0, i1, j0, j1 in matcher.get_opcodes():
        for k in range(max(i1 - i0, j1 - j0)):
            old, new = before[i0 + k] if i0 + k < i1 else None, after[j0 + k] if j0 + k < j1 else None
            steps.append(_step(old, new))
    yield tag("ol", *steps, class_="layer")


def _step(old: dict[str, Any] | None, new: dict[str, Any] | None) -> Markup:
    if old == new:
        return tag("li", _kernel(old, None), _kernel(new, None), class_="same")
    return tag("li", _kernel(old, "gone"), _kernel(new, "new"), class_="changed")


def _kernel(kernel: dict[str, Any] | None, change: str | None) -> Markup:
    if kernel is None:
        return tag("div", class_="empty")
    sign = {None: None, "gone": "− ", "new": "+ "}[change]  # noqa: RUF001
    return tag(
        "div",
        tag("b", sign and tag("span", sign, aria_label=change), kernel["name"] or "(layer)"),
        tag("small", ", ".join(_operators(kernel))),
        class_=" ".join(filter(None, ("kernel", kernel["kind"], change))),
    )


# -- memory and explanation -------------------------------------------------------------------------------------------


def _memory(memory: dict[str, Any]) -> Iterator[Markup]:
    body: list[list[Any]] = [
        ["weights", units.bytes_(memory["weights"])],
        ["derived weights beside them", units.bytes_(memory["derived"])],
    ]
    if memory["cache"] is not None:
        at = f"key-value cache, batch {memory['batch']:,}, {memory['cache_length']:,} positions"
        body.append([at, units.bytes_(memory["cache"])])
        body.append(["one more position of one sequence", units.bytes_(memory["cache_per_token"])])
    yield _table(["", "bytes"], body, caption="Device memory under torch.compile")
    if memory["derived"]:
        yield tag("p", "effpass.prepare and exports hold one copy of the weights: nothing derived.", class_="quiet")


def _explanation(ceilings: dict[str, Any]) -> Iterator[Markup]:
    yield tag(
        "p",
        "A kernel is a matrix product, an attention, or a group of pointwise operators and reductions that a compiler"
        " fuses. Its predicted time is ",
        tag("code", "latency + max(FLOPs / peak, bytes / bandwidth)"),
        "; that of a call is the sum. The bound lets all FLOPs run at peak and reads weights and cache once. Not in the"
        " model: caches between kernels, kernels that run side by side, and work of the host.",
    )
    latency = ceilings["latency"]
    body: list[list[Any]] = [
        ["matrix products", f"{units.flops(ceilings['peak'])}/s"],
        ["attention", f"{units.flops(ceilings['attention_peak'])}/s"],
        ["reading memory", f"{units.bytes_(ceilings['bandwidth'])}/s"],
        ["reading a matrix for one vector", f"{units.bytes_(ceilings['matvec_bandwidth'])}/s"],
        *([f"latency of a kernel, {kind}", units.duration(seconds)] for kind, seconds in latency.items()),
    ]
    yield _table(["", "measured"], body, caption=f"Ceilings of {ceilings['device']}, {ceilings['dtype']}")
    yield tag("p", join([f"effpass {__version__}; ceilings measured with torch {ceilings['torch']}."]), class_="quiet")
