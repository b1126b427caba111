"""Area `balance` on several GPUs: a model is trained on the ranks that torchrun started, and each step is timed.

    torchrun --standalone --nproc-per-node 4 -m benchmarks balance --device cuda --case ranks --json FILE

The model has the widths of Qwen3-1.7B, 4 layers, a small vocabulary and random weights. It is trained as `effpass train
sft --attention sparse --balance` does it: float32 weights under autocast, AdamW, and DDP, whose ranks meet once a step.
The latency table is measured first, by rank 0. Lengths and budgets are half of SparseBalance's. Routers with random
weights would choose at random, so their queries are scaled; rows say which coverage the tuner measured. All ways have
the same samples in a step and take turns. A rank's own time ends with its last gradient, before it waits for others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch.distributed as dist

from benchmarks.balance_lengths import LENGTHS
from benchmarks.balance_ranks_data import LARGE, MICRO_STEPS, TINY, WARM, Data, Sizes
from benchmarks.balance_ranks_model import Called, Model, Taken
from benchmarks.balance_real import WAYS
from benchmarks.moe_ranks import start
from benchmarks.rows import Row, row
from effpass.trainers.balance import SparsityTuner
from effpass.trainers.balance.shares import Shares

__all__ = ["ranks"]

AREA = "balance"
EVERY = 8  # steps between two measurements of the coverage, as in a run

BASE = next(iter(WAYS))


def ranks(device: str, smoke: bool) -> Iterator[Row]:
    """The five ways on samples of two kinds."""
    group = start(device, AREA)
    if group is None:
        return
    of = TINY if device == "cpu" else replace(LARGE, steps=TINY.steps) if smoke else LARGE
    kinds = {name: Data(draw, of, group.size) for name, draw in LENGTHS.items()}
    model = Model(of, device, group.me, max(data.most for data in kinds.values()))
    for name, data in kinds.items():
        every: list[Any] = [None] * group.size
        dist.all_gather_object(every, _trained(model, data))
        if group.me == 0:
            case = f"{name} to {max(data.lengths)} tokens on {group.size} ranks, trained: {data.batch} samples a step"
            yield from _rows(f"{case} in {MICRO_STEPS} micro-steps", every, of, device)


def _trained(model: Model, data: Data) -> dict[str, list[Taken]]:
    """What each step took that counts, by way."""
    ways: dict[str, tuple[Callable[[int], Shares], Called, SparsityTuner | None]] = {}
    tuning = model.of.sparse.tuning
    for name, (batching, direction) in WAYS.items():
        called, tuner = Called(model.ddp), None
        how: dict[str, Any] = {"budget": tuning.default}
        if direction == "both":
            tuner = SparsityTuner(called, model.routed, model.table, tuning, every=1)
            how = {"expected": tuner.expected}
        shares: Callable[[int], Shares] = data.random.__getitem__
        if batching != "random":
            table = data.even if batching == "length" else model.fixed if tuner is None else model.table
            shares = partial(data.batches(table, **how).plan, 0)
        ways[name] = shares, called, tuner
    largest: Shares = [[data.largest] * MICRO_STEPS] * data.world
    model.step(Called(model.ddp), None, largest, data.samples)  # memory is taken once
    found: dict[str, list[Taken]] = {name: [] for name in ways}
    for step in range(data.steps):
        for name, (shares, called, tuner) in ways.items():  # in turn, so that a drift of the machine meets all alike
            taken = model.step(called, tuner, shares(step), data.samples)
            if step >= WARM:
                found[name].append(taken)
            elif tuner is not None and step == WARM - 1:
                tuner.every = EVERY
    for _, _, tuner in ways.values():
        if tuner is not None:
            tuner.close()
    return found


def _rows(case: str, every: list[dict[str, list[Taken]]], of: Sizes, device: str) -> Iterator[Row]:
    """Of what each rank found, by way and step."""
    steps = {way: np.array([[taken.step for taken in rank[way]] for rank in every]).max(0) * 1e3 for way in WAYS}
    for way, found in every[0].items():
        own = np.array([[taken.own for taken in rank[way]] for rank in every])
        took, simulated = float(steps[way].mean()), float(np.mean([taken.simulated for taken in found])) * 1e3
        covered = np.mean([taken.coverage for taken in found])
        note = f"mean budget {np.mean([taken.budget for taken in found]):.0f} keys, default {of.sparse.tuning.default}"
        note += "" if np.isnan(covered) else f", they cover {covered:.3f} of the router's weight"
        common: dict[str, Any] = {"device": device, "runs": len(found)}
        gains = steps[BASE] / steps[way]
        against: dict[str, Any] = {"peer": float(steps[BASE].mean()), "peer_name": BASE} if way != BASE else {}
        said = f"; single steps {gains.min():.2f} to {gains.max():.2f} times as fast" if against else ""
        yield row(AREA, case, f"measured step, {way}", took, "ms", note=note + said, **common, **against)
        yield row(
            AREA, case, f"measured imbalance, {way}", float((own.max(0) / own.mean(0)).mean()), "max/mean",
            peer=float(np.mean([taken.imbalance for taken in found])), peer_name="simulated for the same plans",
            note=note, **common,
        )  # fmt: skip
        yield row(
            AREA, case, f"simulated over measured time, {way}", simulated / took * 100, "%",
            note=f"simulated {simulated:.0f} ms, measured {took:.0f} ms with the exchange of gradients and the"
            f" optimizer; {note}", **common,
        )  # fmt: skip
