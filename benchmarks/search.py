"""Area `search`: what `effpass optimize --goal` finds, against measuring every legal recipe.

Case `flagship` searches for memory within several limits of the loss, with recipes of at most three passes, and then
measures all that it has left out, with the same requests and texts; `flagship_speed` does so for latency and
throughput. A recipe is measured once in a run: the same figure counts for the search and for the best of all. Case
`named` measures the recipes that have a name, for mixtures of experts (`EFFPASS_MODEL=models/tiny-moe`) one more.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.quality import _tiny
from benchmarks.rows import Row, row
from effpass.core.model import load_model
from effpass.search.explore import added_loss, best, quality_loss
from effpass.search.log import ARTIFACTS, Log
from effpass.search.measure import Trial, measure
from effpass.search.plot import AXES
from effpass.search.recipes import DENSE, Candidate
from effpass.search.run import Search
from effpass.search.texts import Texts, builtin_text
from effpass.search.workload import Goal, Workload

AREA = "search"
LIMITS = (0.01, 0.05, 0.2)


class _Once(Search):
    """A search whose recipes are measured once in a run."""

    table: dict[str, Trial]

    def measure(self, candidate: Candidate) -> Trial:
        if candidate.key not in self.table:
            self.table[candidate.key] = super().measure(candidate)
        self.trials[candidate] = self.log.trials[candidate.key] = self.table[candidate.key]
        return self.table[candidate.key]


def flagship(device: str, smoke: bool, goals: tuple[Goal, ...] = ("memory",)) -> Iterator[Row]:
    """Found by the search, and the best of all."""
    name, workload, load, texts = _what(device, smoke)
    table: dict[str, Trial] = {}
    with tempfile.TemporaryDirectory(prefix="effpass-search-") as folder:
        for goal in goals:
            before: Search | None = None
            for limit in LIMITS:
                search = _search(Path(folder), goal, limit, load, texts, workload, table, before)
                search.run()
                measured = len(search.trials)
                found = best(search.trials, goal, limit)
                chosen = search.confirm()
                for candidate in search.candidates:
                    search.measure(candidate)
                case = f"{name}, {_told(workload)}, loss within {limit:.0%}"
                yield from _rows(case, search, found, chosen, measured, device)
                before = search


def flagship_speed(device: str, smoke: bool) -> Iterator[Row]:
    """The same for time; on a machine with nothing else to do."""
    yield from flagship(device, smoke, ("latency", "throughput"))


def _search(
    folder: Path, goal: Goal, limit: float, load: Any, texts: Texts, workload: Workload, table: dict[str, Trial],
    before: Search | None,
) -> _Once:  # fmt: skip
    log = Log(folder / f"{goal}-{limit}", {})
    artifacts = sorted(folder.glob(f"*/{ARTIFACTS}"))
    if artifacts:
        shutil.copytree(artifacts[0], log.folder / ARTIFACTS)
    if before is not None:
        log.predicted = before.log.predicted
    search = _Once(log, load, texts, goal, limit, workload, say=lambda line: print(line, flush=True))
    search.table = table
    search.begin()
    return search


def _rows(case: str, search: Search, found: Candidate, chosen: Candidate, measured: int, device: str) -> Iterator[Row]:
    trials, goal = search.trials, search.goal
    unit, factor = AXES[goal]
    everything = best(trials, goal, search.limit)
    loss, error = 100 * quality_loss(trials, found), 100 * added_loss(trials, found)[1]
    yield row(
        AREA, case, f"{goal}, the recipe that is found", factor * trials[found].of(goal), unit, device=device,
        peer=factor * trials[everything].of(goal), peer_name=f"best of all {len(trials)} legal recipes",
        note=f"{measured} of {len(trials)} measured; found {found.key}, perplexity {loss:+.2f} % (error {error:.2f});"
        f" best of all {everything.key}",
    )  # fmt: skip
    after = 100 * quality_loss(trials, chosen, confirmed=True)
    yield row(
        AREA, case, f"{goal}, the recipe that holds on another text", factor * trials[chosen].of(goal), unit,
        device=device, peer=factor * trials[DENSE].of(goal), peer_name="the model as it is",
        note=f"{chosen.key}, perplexity {after:+.2f} % there",
    )  # fmt: skip


def named(device: str, smoke: bool) -> Iterator[Row]:
    """Each recipe that has a name and is meant for the model, beside the model as it is."""
    from effpass import api
    from effpass.cli.demo_recipes import RECIPES
    from effpass.runtime.speculative.shared_experts import expert_modules

    name, workload, load, texts = _what(device, smoke)
    recipes = (*RECIPES, "moe-serving") if expert_modules(load()) else RECIPES
    dense = measure(api.prepare(load(), {"passes": []}), texts.selection, workload)
    for recipe in recipes:
        trial = measure(api.prepare(load(), recipe), texts.selection, workload)
        case = f"{name}, {_told(workload)}"
        note = f"perplexity {math.exp(mean(trial.losses)):.3f}, dense {math.exp(mean(dense.losses)):.3f}"
        for goal in ("memory", "latency", "throughput"):
            unit, factor = AXES[goal]
            yield row(
                AREA, case, f"{goal}, {recipe}", factor * trial.of(goal), unit, device=device,
                peer=factor * dense.of(goal), peer_name="the model as it is", note=note,
            )  # fmt: skip


def _what(device: str, smoke: bool) -> tuple[str, Workload, Any, Texts]:
    """The model's name, requests, what loads it, and texts; `EFFPASS_WORKLOAD` is batch, prompt, new tokens, pieces."""
    if smoke:
        tiny, tokenizer, name = _tiny(device)
        workload = Workload(1, 128, 4, 2)
        return name, workload, lambda: copy.deepcopy(tiny), Texts.of(builtin_text()[:4000], None, tokenizer, workload)
    sizes = os.environ.get("EFFPASS_WORKLOAD", "8,256,16,8" if device == "cpu" else "16,4096,64,16").split(",")
    workload = Workload(*map(int, sizes))
    name = os.environ.get("EFFPASS_MODEL", "smollm2")
    device_map = None if device == "cpu" else {"": device}
    tokenizer = load_model(name).tokenizer

    def load() -> Any:
        return load_model(name, device_map=device_map).model

    return name, workload, load, Texts.of(builtin_text(), None, tokenizer, workload)


def _told(workload: Workload) -> str:
    return (
        f"batch {workload.batch}, {workload.prompt} + {workload.new_tokens} tokens, {workload.sequences} pieces of text"
    )


CASES = {"flagship": flagship, "flagship_speed": flagship_speed, "named": named}
