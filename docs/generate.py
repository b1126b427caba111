"""Write the generated parts of the documents: the table of passes, and the benchmark rows.

    python docs/generate.py            # rewrite what is out of date
    python docs/generate.py --check    # exit code 1 when they are out of date

A generated part stands between two marks, and a test compares it with what this script would write.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))  # the table of passes together is what the tests run

_PART = re.compile(r"(?P<open><!-- generated: (?P<name>\w+) -->\n).*?(?P<close><!-- end of generated -->)", re.DOTALL)


def passes_table(document: Path) -> str:
    """effpass's own passes as a Markdown table; links are relative to `document`."""
    from effpass.core.registry import describe

    rows = ["| pass | kind | meaning | model | program | backend | what it does |", "|---|---|---|:-:|:-:|:-:|---|"]
    for info in describe():
        if info.distribution != "effpass":
            continue
        if info.error is not None:
            raise SystemExit(info.error)
        page = ROOT / "docs" / "passes" / f"{info.name}.md"
        link = os.path.relpath(page, document.parent).replace(os.sep, "/")
        name = f"[`{info.name}`]({link})" if page.is_file() else f"`{info.name}`"
        meaning = "exact" if info.exact else "approximate"
        marks = ["✓" if entrance in info.entrances else "" for entrance in ("model", "program", "backend")]
        summary = info.summary + (" Needs an artifact." if info.needs_artifact else "")
        rows.append(f"| {name} | {info.kind} | {meaning} | {' | '.join(marks)} | {summary} |")
    return "\n".join(rows) + "\n"


# What stands in the place of a table of rows that have not been taken.
_NONE = "No rows have been committed yet.\n"


def _rows(area: str) -> list[dict[str, Any]]:
    """The committed rows of an area, in the order they were taken; none before the first were."""
    path = ROOT / "benchmarks" / "results" / f"{area}.jsonl"
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def measured_rows(area: str, but: tuple[str, ...] = (), without: str = "$^") -> str:
    """The committed rows of an area, one line each; none in a unit of `but`, or whose metric `without` matches."""
    lines = [
        "| case | metric | effpass | peer | ratio | bound | runs | device, torch, commit |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in _rows(area):
        if row["unit"] in but or re.match(without, row["metric"]):
            continue
        peer = f"{row['peer']:.4g} ({row['peer_name']})" if row["peer"] is not None else ""
        ratio = f"{row['ratio']:.3f}" if row["ratio"] is not None else ""
        bound = f"{row['bound']:.3g}" if row["bound"] is not None else ""
        where = f"{row['device']}, {row['versions']['torch']}, {row['commit']}"
        ours = f"{row['ours']:.4g} {row['unit']}"
        lines.append(
            f"| {row['case']} | {row['metric']} | {ours} | {peer} | {ratio} | {bound} | {row['runs']} | {where} |"
        )
    return "\n".join(lines) + "\n" if lines[2:] else _NONE


def cost_rows(document: Path) -> str:
    """The committed rows of area `cost`: predicted beside measured."""
    lines = ["| step | predicted | measured | difference |", "|---|--:|--:|---|"]
    for text in (ROOT / "benchmarks" / "results" / "cost.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        what = row["metric"].removeprefix("predicted step time, ")
        measured = f"{row['peer']:.4g} {row['unit']}" if row["peer"] is not None else ""
        lines.append(f"| {row['case']}, {what} | {row['ours']:.4g} {row['unit']} | {measured} | {row['note']} |")
    return "\n".join(lines) + "\n"


def budget_rows(document: Path) -> str:
    """The committed rows of area `prefix_kv` on quality: a line for each case and budget, a column for each method."""
    ours = "prefix_kv, searched"
    methods = (f"{ours}, not pooled", "uniform", "StreamingLLM", "H2O", "SnapKV", "PyramidKV", "global top-k")
    methods = (*methods, f"{ours}, int8")
    titles = " | ".join(name.removeprefix(f"{ours}, ") for name in methods)
    lines = [f"| model, what follows the prompt | whole | prefix_kv | {titles} |"]
    lines.append("|---|" + "--:|" * (len(methods) + 2))
    found: dict[str, dict[str, float]] = {}
    weak = set()
    for text in (ROOT / "benchmarks" / "results" / "prefix_kv.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        if row["metric"].endswith(ours) and row["bound"] is not None:
            values = found.setdefault(f"{row['case']}, {row['unit']}", {"whole": row["bound"], ours: row["ours"]})
            values[row["peer_name"]] = row["peer"]
            if "no signal" in row["note"]:
                weak.add(f"{row['case']}, {row['unit']}")
    for case, values in found.items():
        if case not in weak:
            shown = (f"{values[name]:.4g}" for name in ("whole", ours, *methods))
            lines.append(f"| {case} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def curve_rows(document: Path) -> str:
    """The committed rows of area `prefix_kv` on profiles: what each layer keeps."""
    lines = ["| profile | kept of all layers | kept of each layer, the first to the last |", "|---|--:|---|"]
    for row in _rows("prefix_kv"):
        if match := re.fullmatch(r"smallest share of a layer at (\d+%)", row["metric"]):
            shares = row["note"].removeprefix("shares of the layers: ")
            lines.append(f"| {row['case']} | {match[1]} | {shares} |")
    return "\n".join(lines) + "\n" if lines[2:] else _NONE


def simulated_rows(document: Path) -> str:
    """The committed rows of area `balance` that were simulated: a line for each case, the step's time and imbalance."""
    ways = {
        "batches by length, fixed budget": "by length",
        "batches by seconds, fixed budget": "by seconds",
        "random batches, tuned budgets": "budgets tuned",
        "batches by seconds, tuned budgets": "both",
        "batches by seconds, tuned budgets, a router that is sure": "both, a router that is sure",
    }
    lines = ["| lengths, ranks | random batches, fixed budget | " + " | ".join(ways.values()) + " |"]
    lines.append("|---|--:|" + "--:|" * len(ways))
    found: dict[str, dict[str, str]] = {}
    for row in _rows("balance"):
        kind, _, way = row["metric"].partition(", ")
        if kind not in ("simulated step", "simulated imbalance") or not row["peer_name"].startswith("random"):
            continue
        is_step = kind == "simulated step"
        shown = found.setdefault(f"{row['case']}: {'step' if is_step else 'imbalance'}", {})
        shown["base"] = f"{row['peer'] / 1e3:.3g} s" if is_step else f"{row['peer']:.2f}"
        shown[way] = f"{row['ratio']:.2f} times as fast" if is_step else f"{row['ours']:.2f}"
    for case, shown in found.items():
        lines.append(f"| {case} | {shown['base']} | " + " | ".join(shown[way] for way in ways) + " |")
    return "\n".join(lines) + "\n" if lines[2:] else _NONE


def retention_rows(document: Path) -> str:
    """The committed rows of area `sparse_attention` on trained models: a line for each choice of keys."""
    found: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    weak = set()
    for row in _rows("sparse_attention"):
        if (how := row["metric"]).startswith(_ANSWERS):
            column = re.sub(r" sha256:\w+|, \d+ bytes", "", row["case"])
            columns[column] = None
            if "no signal" in row["note"]:
                weak.add(column)
            found.setdefault(how.removeprefix(_ANSWERS), {})[column] = f"{row['ours']:.1f}"
    shown = [column for column in columns if column not in weak]
    lines = ["| attends to | " + " | ".join(shown) + " |", "|---|" + "--:|" * len(shown)]
    lines += [f"| {how} | " + " | ".join(values.get(c, "") for c in shown) + " |" for how, values in found.items()]
    return "\n".join(lines) + "\n" if found else _NONE


_ANSWERS = "answers right, "


def expert_rows(document: Path) -> str:
    """The committed rows of area `moe` of one device: a line for each load."""
    lines = [
        "| layer, load | effpass, µs | times grouped_mm's | times batched_mm's | others | of the bound |"
        " lost by the choice |",
        "|---|--:|--:|--:|---|--:|--:|",
    ]
    loads: dict[str, dict[str, Any]] = {}
    for row in _rows("moe"):
        if row["metric"] in ("layer of experts", "lost by the choice of the kernel") and "ranks" not in row["case"]:
            loads.setdefault(row["case"], {})[row["peer_name"] or row["metric"]] = row
    for case, found in sorted(loads.items(), key=_by_tokens):
        lost = found.pop("lost by the choice of the kernel")
        first = found.get("transformers grouped_mm") or next(iter(found.values()))
        usual = [found.pop(f"transformers {name}", None) for name in ("grouped_mm", "batched_mm")]
        more = "; ".join(f"{name.removesuffix(', grouped_mm')} {row['ratio']:.2f}" for name, row in found.items())
        lines.append(
            f"| {case}: {first['note'].split(';')[0]} | {first['ours']:.4g} |"
            + "".join(f" {'' if row is None else format(row['ratio'], '.2f')} |" for row in usual)
            + f" {more} | {first['ours'] / first['bound']:.2f} | {lost['ours']:.1f} % |"
        )
    return "\n".join(lines) + "\n" if lines[2:] else _NONE


def _by_tokens(load: tuple[str, Any]) -> tuple[str, int, str]:
    layer, tokens, routing = load[0].split(", ", 2)
    return layer, int(tokens.split()[0]), routing


def rank_rows(document: Path) -> str:
    """The committed rows of area `moe` of several devices."""
    lines = ["| case | metric | effpass | peer | ratio | device |", "|---|---|--:|--:|--:|---|"]
    for row in _rows("moe"):
        if "ranks" in row["case"]:
            peer = f"{row['peer']:.4g} ({row['peer_name']})" if row["peer"] is not None else ""
            ratio = f"{row['ratio']:.3f}" if row["ratio"] is not None else ""
            ours = f"{row['ours']:.4g} {row['unit']}"
            lines.append(f"| {row['case']} | {row['metric']} | {ours} | {peer} | {ratio} | {row['device']} |")
    return "\n".join(lines) + "\n" if lines[2:] else _NONE


def pruning_rows(document: Path) -> str:
    """The committed rows of area `pruning` on quality: the difference to each peer, and what is left of the cost."""
    lines = ["| model, cost, run | figure | ours | peer | difference, nats | left, of ours and of the peer | device |"]
    lines.append("|---|---|--:|--:|---|---|---|")
    for row in _rows("pruning"):
        if row["peer"] is not None and row["unit"] in _QUALITY:
            difference, _, left, _ = row["note"].split("; ")
            difference = difference.removeprefix("difference ").replace(" nats over", " over")
            lines.append(
                f"| {row['case']} | {row['metric']} | {row['ours']:.4g} | {row['peer']:.4g} ({row['peer_name']}) |"
                f" {difference} | {left} | {row['device']} |"
            )
    return "\n".join(lines) + "\n" if lines[2:] else _NONE


# Units of perplexities and of losses.
_QUALITY = ("", "nats")


def memory_rows(document: Path) -> str:
    """The committed rows of area `export` that say how much memory an export takes."""
    lines = ["| export | peak memory over weights |", "|---|--:|"]
    for text in (ROOT / "benchmarks" / "results" / "export.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        if row["metric"] == "peak memory over weights":
            lines.append(f"| {row['case']} | {row['ours']:.2f} |")
    return "\n".join(lines) + "\n"


# Area, metric and the cases that a user meets first; none: all.
_HEADLINES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("decode", "greedy, a token", ()),
    ("moe", "layer of experts", ("qwen3-30b-a3b, 16 tokens, even", "deepseek-v2, 128 tokens, even")),
    ("sparse_attention", "two levels, 2048 tokens", ("GQA 32/8 x 128, 98304 tokens, batch 8",)),
    ("export", "throughput, prefill included", ()),
)


def headline_rows(document: Path) -> str:
    """What a user meets first, against its peers; of several runs, the one with the smallest gain."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for area, metric, cases in _HEADLINES:
        for row in _rows(area):
            named = row["case"] in cases if cases else row["peer"] is not None
            if row["metric"] == metric and named and not row["peer_name"].endswith("batched_mm"):
                key = (row["case"], row["peer_name"], row["device"])
                found[key] = min(found.get(key, row), row, key=lambda run: run["ratio"])
    lines = ["| what | effpass | peer | times as fast | device |", "|---|--:|--:|--:|---|"]
    for row in found.values():
        ours, peer = (f"{row[side]:.3g}" for side in ("ours", "peer"))
        lines.append(
            f"| {row['case']}: {row['metric']} | {ours} {row['unit']} | {peer} ({row['peer_name']}) |"
            f" {row['ratio']:.2f} | {row['device']} |"
        )
    return "\n".join(lines) + "\n"


def search_rows(document: Path) -> str:
    """The committed rows of area `search`: each figure with the recipes it belongs to."""
    lines = ["| case | figure | effpass | peer | ratio | recipes, loss of quality | device |"]
    lines.append("|---|---|--:|--:|--:|---|---|")
    for row in _rows("search"):
        lines.append(
            f"| {row['case']} | {row['metric']} | {row['ours']:.4g} {row['unit']} | {row['peer']:.4g}"
            f" ({row['peer_name']}) | {row['ratio']:.3f} | {row['note']} | {row['device']} |"
        )
    return "\n".join(lines) + "\n" if lines[2:] else _NONE


def composition_rows(document: Path) -> str:
    """The cells that the tests run: passes that stand together, on which models, with which weights, and where."""
    from composition.cells import CELLS, FILES, WEIGHTS

    cells = {(*cell.names, "the engine"): (dict.fromkeys(cell.families), dict.fromkeys(WEIGHTS)) for cell in CELLS}
    for names, family, target, weights, _ in FILES:
        families, kinds = cells.setdefault((*names, f"{target} files"), ({}, {}))
        families[family] = kinds[weights] = None
    lines = ["| passes | where | models | weights |", "|---|---|---|---|"]
    for (*names, where), (families, kinds) in cells.items():
        lines.append(f"| {' × '.join(names)} | {where} | {', '.join(families)} | {', '.join(kinds)} |")  # noqa: RUF001
    return "\n".join(lines) + "\n"


def refused_rows(document: Path) -> str:
    """Pairs of passes that stand together in neither order, with what is said of them."""
    from composition.cells import NOT_BUILT, refused_pairs

    lines = ["| passes | why |", "|---|---|"]
    pairs = refused_pairs()
    for names, reason in pairs.items():
        lines.append(f"| {' × '.join(names)} | {reason}{' *Not built.*' if names in NOT_BUILT else ''} |")  # noqa: RUF001
    count = sum(names in NOT_BUILT for names in pairs)
    return "\n".join(lines) + f"\n\n{count} of these could be built, and are not.\n"


_FORMS = ("gdn", "kda", "fg2", "fg2+", "window", "attention")


def conversion_rows(document: Path) -> str:
    """The committed rows of area `linear_attention` on converted models: a line for each model and share of layers."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in _rows("linear_attention"):
        if named := re.fullmatch(r"(.*), (.*) in (\d+) % of the layers", row["case"]):
            model, form, share = named.groups()
            line = found.setdefault((model, f"{share:>3} %"), {"before": {}})
            if row["metric"] in line.setdefault(form, {}):
                raise SystemExit(f"{row['case']}, {row['metric']}: two rows")
            line[form][row["metric"]], line["before"][row["metric"]] = row["ours"], row["peer"]
    columns = ("before", *_FORMS[:-1])
    lines = ["| model, share of the layers | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    for (model, share), line in sorted(found.items()):
        shown = []
        for of in (line.get(name) for name in columns):
            needles = [] if of is None else [of[f"needles found in {length} bytes"] for length in (256, 1024)]
            shown.append(
                "" if of is None else f"{of['perplexity after whole']:.4g}; " + ", ".join(f"{x:.0f}" for x in needles)
            )
        lines.append(f"| {model}, {share.strip()} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def recall_rows(document: Path) -> str:
    """The committed rows of area `linear_attention` on recall: a line for each load, a column for each form."""
    found: dict[str, dict[str, str]] = {}
    for row in _rows("linear_attention"):
        if row["metric"] == "recall":
            form, load = row["case"].split(", ", 1)
            found.setdefault(load, {})[form] = f"{row['ours']:.1f}"
    by_size = sorted(found.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])])
    return _by_form("load", dict(by_size))


def pretraining_rows(document: Path) -> str:
    """The committed rows of area `linear_attention` on pretraining: a line for each metric and kind of data."""
    found: dict[str, dict[str, str]] = {}
    for row in _rows("linear_attention"):
        form, _, data = row["case"].partition(", ")
        if form in _FORMS and re.match(r"loss of|\w+ answered", row["metric"]):
            found.setdefault(f"{data} | {row['metric']}, {row['unit']}", {})[form] = f"{row['ours']:.3g}"
    return _by_form("data | metric", found)


def _by_form(title: str, found: dict[str, dict[str, str]]) -> str:
    """A table with a line for each entry, and a column for each form of linear attention."""
    lines = [f"| {title} | " + " | ".join(_FORMS) + " |", "|---" * title.count("|") + "|---|" + "--:|" * len(_FORMS)]
    lines += [f"| {name} | " + " | ".join(of.get(form, "") for form in _FORMS) + " |" for name, of in found.items()]
    return "\n".join(lines) + "\n"


def linear_speed_rows(document: Path) -> str:
    """The committed rows of area `linear_attention` against other libraries, in CUDA graphs and at fast gates."""
    peers = ("chunk_kda", "chunk_gdn2", "KDA")
    lines = ["| pass, shape | fla-core's chunk_kda | fla-core's chunk_gdn2 | cuDNN's KDA |", "|---|--:|--:|--:|"]
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in _rows("linear_attention"):
        case = re.fullmatch(r"(kda|fg2\+) (\S+), fast gates", row["case"])
        if case and (what := row["metric"].removesuffix(", in a graph")) != row["metric"]:
            peer = next(name for name in peers if f" {name}" in row["peer_name"])
            of = found.setdefault((what, case[2]), {}).setdefault(peer, {})
            of[case[1]] = min(of.get(case[1], row["ratio"]), row["ratio"])  # cuDNN has several kernels
    for (what, shape), by_peer in sorted(found.items()):
        ratios = (by_peer.get(peer) for peer in peers)
        shown = ("" if of is None else f"{of['fg2+']:.2f} ({of['kda']:.2f})" for of in ratios)
        lines.append(f"| {what}, {shape} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def linear_segment_rows(document: Path) -> str:
    """The committed rows of area `linear_attention` on segments: microseconds, a column for each number of segments."""
    numbers = (1, 3, 4, 8)
    found: dict[str, dict[int, float]] = {}
    for row in _rows("linear_attention"):
        if case := re.fullmatch(r"fg2\+ (.*), (\d+) segments", row["case"]):
            found.setdefault(case[1], {})[1] = row["peer"]
            found[case[1]][int(case[2])] = row["ours"]
    lines = ["| shape, gates | " + " | ".join(map(str, numbers)) + " |", "|---|" + "--:|" * len(numbers)]
    for name, of in found.items():
        lines.append(f"| {name} | " + " | ".join(f"{of[n]:.4g}" if n in of else "" for n in numbers) + " |")
    return "\n".join(lines) + "\n"


# Metrics of the ways to cut a launch that were compared, and of answers, which have a table of their own.
_CUT_OTHERWISE = rf"two levels, (score|choose|attend|as it is)|full, \(|{_ANSWERS}"

# Metrics of linear attention that have tables of their own, or are compared in those.
_LINEAR_ELSEWHERE = r"recall|loss of|\w+ answered|perplexity|needles|cache of|forward(?!, a token)|training"

PARTS: dict[str, Callable[[Path], str]] = {
    "passes": passes_table,
    "composition": composition_rows,
    "refused": refused_rows,
    "backend": lambda document: measured_rows("backend"),
    "export": lambda document: measured_rows("export"),
    "decode": lambda document: measured_rows("decode"),
    "optimizer": lambda document: measured_rows("optimizer"),
    "quality": lambda document: measured_rows("quality"),
    "budgets": budget_rows,
    "curves": curve_rows,
    "prefix_kv": lambda document: measured_rows("prefix_kv", but=("nats", "%")),
    "kv_offload": lambda document: measured_rows("kv_offload"),
    "pruning": pruning_rows,
    "pruning_speed": lambda document: measured_rows("pruning", but=_QUALITY),
    "training": lambda document: measured_rows("training"),
    "experts": expert_rows,
    "expert_ranks": rank_rows,
    "adapters": lambda document: measured_rows("adapters"),
    "conversions": conversion_rows,
    "recall": recall_rows,
    "pretraining": pretraining_rows,
    "linear_speed": linear_speed_rows,
    "linear_segments": linear_segment_rows,
    "linear_attention": lambda document: measured_rows("linear_attention", without=_LINEAR_ELSEWHERE),
    "balance": lambda document: measured_rows("balance", without=r"simulated (step|imbalance)|coverage of"),
    "simulated": simulated_rows,
    "sparse_attention": lambda document: measured_rows("sparse_attention", without=_CUT_OTHERWISE),
    "retention": retention_rows,
    "speculative": lambda document: measured_rows("speculative"),
    "cost": cost_rows,
    "headline": headline_rows,
    "search": search_rows,
    "memory": memory_rows,
}
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "docs" / "passes" / "index.md",
    ROOT / "docs" / "benchmarks.md",
    ROOT / "docs" / "composition.md",
    ROOT / "docs" / "linear-attention.md",
    ROOT / "docs" / "report.md",
    ROOT / "docs" / "targets.md",
)


def generated(document: Path) -> str:
    """The text of `document` with its generated parts as they should be."""

    def part(match: re.Match[str]) -> str:
        return match["open"] + PARTS[match["name"]](document) + match["close"]

    return _PART.sub(part, document.read_text(encoding="utf-8"))


def main() -> None:
    stale = [document for document in DOCUMENTS if generated(document) != document.read_text(encoding="utf-8")]
    if "--check" in sys.argv[1:]:
        sys.exit("out of date: " + ", ".join(str(d.relative_to(ROOT)) for d in stale) if stale else 0)
    for document in stale:
        text = generated(document)
        handle, temporary = tempfile.mkstemp(dir=document.parent)
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, document)
        print(f"wrote {document.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
