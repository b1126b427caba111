"""Area `balance`: long-context training whose ranks do not wait for each other.

Cases named after lengths and ranks are *simulated*: steps are played on a latency table, measured on the device that
the rows name (`table` measures one), or made up where the note says so. Peers are random batching with a fixed budget,
which is the base, and the same batching by lengths alone. All sides have the same samples in a step, the same number
of micro-batches, and the memory that random batching needs. `planner` times the planning here. `real` runs 4 processes
and compares what the simulator says of them; `ranks` trains a model on the GPUs that torchrun started.
"""

from __future__ import annotations

import importlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.balance_kernels import CASES as KERNELS
from benchmarks.balance_lengths import (
    BUDGETS,
    DEFAULT,
    EXPONENT,
    LENGTHS,
    SURE,
    beside,
    coverage,
    fixed_table,
    the_table,
)
from benchmarks.rows import Row, row
from effpass.trainers.balance.batches import BalancedBatches
from effpass.trainers.balance.costs import micro_batches
from effpass.trainers.balance.expected import Expected
from effpass.trainers.balance.simulator import Batching, Layout, Simulated, simulate
from effpass.trainers.balance.table import LatencyTable
from effpass.trainers.balance.tuning import Tuning, tune

AREA = "balance"
RANKS = (8, 32)
TUNING = Tuning(BUDGETS, DEFAULT)
_WORDS = {"random": "random batches", "length": "batches by length", "seconds": "batches by seconds"}


# -- simulated --------------------------------------------------------------------------------------------------------


def simulated(lengths: str, ranks: int, device: str, smoke: bool) -> Iterator[Row]:
    """Batching and tuning, alone and together, at two sizes of a step."""
    table, fixed = the_table(), fixed_table()
    every = LENGTHS[lengths](8192, np.random.default_rng(0))
    for micro_steps in (4, 1):
        layout = Layout(ranks, micro_steps, 2, 2 * int(every.max()))
        case = f"{lengths} on {ranks} ranks, {layout.batch} samples a step in {micro_steps} micro-steps"
        found: dict[tuple[str, str], Simulated] = {}
        ways: tuple[Batching, ...] = ("random", "length", "seconds")
        for batching, direction in itertools.product(ways, ("none", "both")):
            how = replace(TUNING, direction=direction)
            times = fixed if direction == "none" else table
            played = simulate(times, every, layout, how, coverage, batching, steps=4 if smoke else 64)
            found[batching, direction] = played
        for key, ours in found.items():
            if key != ("random", "none"):
                yield from _against_base(table, case, key, ours, found["random", "none"])
        yield from _against_length(table, case, found)
        sure = partial(coverage, exponent=SURE)
        ours = simulate(table, every, layout, TUNING, sure, "seconds", steps=4 if smoke else 64)
        yield from _against_base(table, case, ("seconds", "both"), ours, found["random", "none"], SURE)


def _against_base(
    table: LatencyTable, case: str, key: tuple[str, str], ours: Simulated, base: Simulated, exponent: float = EXPONENT
) -> Iterator[Row]:
    what = _WORDS[key[0]] + (", tuned budgets" if key[1] == "both" else ", fixed budget")
    what += "" if exponent == EXPONENT else ", a router that is sure"
    peer = "random batches, fixed budget"
    note = (
        f"bubbles {ours.bubble:.1%} for {base.bubble:.1%}; budget {ours.budget:.0f} for {base.budget:.0f} keys,"
        f" coverage {ours.coverage:.3f} for {base.coverage:.3f}; {_said(table, exponent)}"
    )
    yield _row(table, case, f"simulated step, {what}", ours.seconds * 1e3, "ms", base.seconds * 1e3, peer, note)
    yield _row(table, case, f"simulated imbalance, {what}", ours.imbalance, "max/mean", base.imbalance, peer, note)


def _against_length(table: LatencyTable, case: str, found: dict[tuple[str, str], Simulated]) -> Iterator[Row]:
    peer = found["length", "none"]
    for direction, what in (
        ("none", "batches by seconds, fixed budget"),
        ("both", "batches by seconds, tuned budgets"),
    ):
        ours = found["seconds", direction]
        note = f"coverage {ours.coverage:.3f} for {peer.coverage:.3f}; {_said(table)}"
        yield _row(
            table, case, f"simulated step, {what}", ours.seconds * 1e3, "ms", peer.seconds * 1e3,
            "batches by length, fixed budget", note,
        )  # fmt: skip


def _row(
    table: LatencyTable, case: str, metric: str, ours: float, unit: str, peer: float, peer_name: str, note: str
) -> Row:
    made = row(AREA, case, metric, ours, unit, device="cpu", peer=peer, peer_name=peer_name, runs=64, note=note)
    return replace(made, device=table.device)


def _said(table: LatencyTable, exponent: float = EXPONENT) -> str:
    kind = {"measured": "measured", "flops": "by FLOPs, not measured", "synthetic": "synthetic, not measured"}
    return f"table {kind[table.source]}; coverage is assumed as (k/s)^{exponent}"


# -- the planner ------------------------------------------------------------------------------------------------------


def planner(device: str, smoke: bool) -> Iterator[Row]:
    """Seconds to plan a step: batches of 4096 samples on 64 ranks, and the budgets of their micro-batches."""
    table = the_table()
    for name, (samples, ranks, micro_steps) in {
        "4096 samples on 64 ranks": (4096, 64, 8), "256 samples on 32 ranks": (256, 32, 4),
    }.items():  # fmt: skip
        for lengths, draw in LENGTHS.items():
            every = draw(samples, np.random.default_rng(0))
            cap = max(int(every.max()), int(1.25 * every.sum() / (ranks * micro_steps)))
            expected = Expected(TUNING, table.layers)
            for octave in range(8, 17):
                sizes = np.full((1, 1), float(2**octave))
                expected.cover(2**octave, np.tile(coverage(sizes, np.asarray(BUDGETS))[0], (table.layers, 1)))
            batches = BalancedBatches(
                every.tolist(), table, batch=samples, max_tokens=cap, micro_steps=micro_steps, world=ranks,
                expected=expected,
            )  # fmt: skip
            taken: list[tuple[float, float]] = []
            for _ in range(3 if smoke else 15):
                started = time.perf_counter()
                shares = batches.plan(0, 0)
                planned = time.perf_counter()
                attention, rest, longest = micro_batches(table, shares, every, BUDGETS)
                tune(attention, rest, *expected.guard(longest), TUNING)
                taken.append((planned - started, time.perf_counter() - planned))
            step = float((rest + table.layers * attention[..., TUNING.index]).max(0).sum())
            sharing, tuning = (median(times) for times in zip(*taken, strict=True))
            case = f"{name}, {micro_steps} micro-steps, {lengths}"
            note = f"sharing out {sharing * 1e3:.1f} ms, budgets of {table.layers} layers {tuning * 1e3:.1f} ms"
            yield row(
                AREA, case, "planning a step", (sharing + tuning) * 1e3, "ms", device="cpu", runs=len(taken), note=note
            )
            yield row(
                AREA, case, "planning, of a simulated step", (sharing + tuning) / step * 100, "%", device="cpu",
                runs=len(taken), note=f"the step takes {step * 1e3:.0f} ms; {_said(table)}",
            )  # fmt: skip


# -- a device's table -------------------------------------------------------------------------------------------------


def table(device: str, smoke: bool) -> Iterator[Row]:
    """Measure the table of a model of 3 billion parameters; EFFPASS_TABLE names the file that it goes to."""
    from benchmarks.balance_table import measured, with_fixed_budget
    from effpass.core.gguf import cache_dir
    from effpass.trainers.balance.table import write_table

    found = measured(device, smoke)
    path = Path(os.environ.get("EFFPASS_TABLE") or cache_dir() / "latency" / "benchmark.json")
    write_table(path, found)
    fixed = with_fixed_budget(found, device, smoke)
    write_table(beside(path), fixed)
    (default,) = fixed.budgets
    for length in found.lengths[-3:]:
        yield row(
            AREA, f"{found.model}: {length} tokens, budget {default}", "attention whose budget may move",
            found.attention_seconds(length, default)[0, 0] * 1e3, "ms", device=device, runs=3,
            peer=fixed.attention_seconds(length, default)[0, 0] * 1e3, peer_name="attention whose budget is fixed",
            note=f"buffers for {found.budgets[-1]} keys and for {default}",
        )  # fmt: skip
    for length in found.lengths[-3:]:
        for budget in (b for b in found.budgets if b in (4096, DEFAULT, 16384) or device == "cpu"):
            yield row(
                AREA, f"{found.model}: {length} tokens, budget {budget}", "attention, forward and backward of a layer",
                found.attention_seconds(length, budget)[0, 0] * 1e3, "ms", device=device, runs=3,
            )  # fmt: skip
    yield row(
        AREA, found.model, f"all but attention, {found.tokens[-1]} tokens", found.rest[-1] * 1e3, "ms", device=device,
        runs=3, note=f"the table stands in {path.name}",
    )  # fmt: skip


def real(device: str, smoke: bool) -> Iterator[Row]:
    from benchmarks.balance_real import real as run

    return run(device, smoke)


def ranks(device: str, smoke: bool) -> Iterator[Row]:
    from benchmarks.balance_ranks import ranks as run

    return run(device, smoke)


def _run(name: str, device: str, smoke: bool) -> Iterator[Row]:
    module = importlib.import_module("benchmarks.balance_" + ("coverage" if name == "coverage" else "quality"))
    return getattr(module, name)(device, smoke)


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    f"{lengths}-{ranks}": partial(simulated, lengths, ranks) for lengths in LENGTHS for ranks in RANKS
}
CASES |= {"planner": planner, "ranks": ranks, "real": real, "table": table, **KERNELS}
CASES |= {name: partial(_run, name) for name in ("ablation", "coverage", "quality")}
