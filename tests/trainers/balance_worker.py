"""What each process of test_balance_ranks runs.

balance_worker.py FOLDER [dies]     with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set; FOLDER/RANK.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from effpass.core.errors import EffpassError
from effpass.trainers.balance.batches import BalancedBatches
from effpass.trainers.balance.table import from_flops
from effpass.trainers.balance.tuner import SparsityTuner
from effpass.trainers.balance.tuning import Tuning

BUDGETS = (1024, 2048, 4096, 8192)
TUNING = Tuning(BUDGETS, 4096)
LAYERS = 3
LENGTHS = tuple(256 * 2**n for n in range(10))
TABLE = from_flops(LENGTHS, BUDGETS, layers=LAYERS, attention_width=512, parameters=20_000_000, rate=1e14)


class Attention:
    """As of a model; covers what it is told, as far as documents are long on this rank."""

    def __init__(self) -> None:
        self.layers, self.budgets, self.curves = LAYERS, torch.zeros(LAYERS, dtype=torch.int32), None
        self._watched = None
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def watch(self, budgets) -> None:
        self._watched = budgets
        self.curves = None

    def run(self) -> None:
        if self._watched is not None:
            spread = 1 + torch.arange(LAYERS)[:, None] + self.rank
            self.curves = (self._watched / self._watched[-1]) ** (0.1 * spread)


class Model(nn.Module):
    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention, self.seen = attention, []

    def forward(self) -> None:
        self.attention.run()
        self.seen.append(self.attention.budgets.tolist())


def samples() -> list[int]:
    rng = np.random.default_rng(5)
    return np.where(rng.random(103) < 0.5, rng.integers(256, 4096, 103), rng.integers(16384, 40000, 103)).tolist()


def train(rank: int, world: int, steps: range, kind: str = "", state=None) -> dict[str, object]:
    """Some steps; what was read, what was planned and what the model saw."""
    attention = Attention()
    model = Model(attention).train()
    tuner = SparsityTuner(model, attention, TABLE, TUNING, every=2)
    lengths = samples()
    batches = BalancedBatches(
        lengths,
        TABLE,
        batch=16,
        micro_steps=2,
        max_tokens=270_000 // world,
        rank=rank,
        world=world,
        expected=tuner.expected,
    )
    if state is not None:
        tuner.load_state_dict(state["tuner"])
        batches.load_state_dict(state["batches"])
    read, plans, states = [], [], []

    def forever():
        while True:
            yield from batches

    found = forever()
    for step in steps:
        states.append({"tuner": tuner.state_dict(), "batches": batches.state_dict(step)})
        micro = [next(found) for _ in range(2)]
        if kind == "dies" and step == 2 and rank == 1:
            os._exit(3)
        documents = [[lengths[n] for n in samples] for samples in micro]
        if kind == "empty" and rank == 1:
            documents[1] = []
        if kind == "uneven" and rank == 1:
            documents.pop()
        plan = tuner.begin_step(documents)
        for _ in micro:
            model()
        read.append(micro)
        plans.append({"budgets": plan.budgets.tolist(), "seconds": plan.seconds.tolist()})
    metrics = tuner.metrics()
    del metrics["balance_planning_ms"]
    return {"read": read, "plans": plans, "seen": model.seen, "metrics": metrics, "states": states}


def main(folder: Path, kind: str = "") -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    found: dict[str, object] = train(rank, world, range(9), kind)
    found["again"] = train(rank, world, range(4, 9), state=json.loads(json.dumps(found["states"][4])))  # type: ignore[index]
    for refused in ("empty", "uneven"):
        try:
            train(rank, world, range(1), refused)
        except EffpassError as error:
            found[refused] = error.message
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
