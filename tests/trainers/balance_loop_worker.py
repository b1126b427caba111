"""What each process of test_balance_loops runs: a tiny model with the three objects, sharded and under accelerate.

balance_loop_worker.py FOLDER     with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set; FOLDER/RANK.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from families import make
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening

from effpass.runtime.routed_attention import install
from effpass.trainers.balance import BalancedBatches, SparsityTuner, Tuning, budgets_around, documents_of
from effpass.trainers.balance.table import from_flops

BLOCK, BUDGET = 32, 64
STEPS = 7


def dataset() -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(3)
    sizes = np.where(rng.random(24) < 0.6, rng.integers(8, 30, 24), rng.integers(150, 250, 24))
    return [{"input_ids": rng.integers(3, 96, size).tolist()} for size in sizes]


def objects(model, rank: int, world: int, waits: str, budget: int = BUDGET, batch: int = 8, **changes):
    """Tuner and batches; the model attends sparsely."""
    tuning = Tuning(budgets_around(budget, BLOCK), budget, waits=waits, **changes)
    attention = install(model, block=BLOCK, budget=budget, max_budget=tuning.budgets[-1])
    lengths = [len(row["input_ids"]) for row in dataset()]
    table = from_flops((32, 128, 256), tuning.budgets, layers=2, attention_width=4096, parameters=10**5, rate=1e9)
    tuner = SparsityTuner(model, attention, table, tuning, every=1)
    batches = BalancedBatches(
        lengths,
        table,
        batch=batch,
        micro_steps=2,
        max_tokens=1200 // world,
        rank=rank,
        world=world,
        expected=tuner.expected,
    )
    return attention, tuner, batches


def steps_of(model, optimizer, tuner, attention, batches, backward) -> dict[str, list]:
    """Train; losses are sums over tokens of this rank, and what they count."""
    loader = DataLoader(dataset(), batch_sampler=batches, collate_fn=DataCollatorWithFlattening())
    found: dict[str, list] = {"losses": [], "tokens": [], "budgets": [], "plans": []}
    for step in range(STEPS):
        if step % batches.steps == 0:
            micro_batches = iter(loader)
        these = [next(micro_batches) for _ in range(batches.micro_steps)]
        plan = tuner.begin_step([documents_of(batch) for batch in these])
        found["plans"].append(plan.budgets.tolist())
        total, count = 0.0, 0
        for batch in these:
            graded = int((batch["labels"][0, 1:] != -100).sum())
            loss = model(**batch, use_cache=False).loss
            backward(loss)
            total, count = total + float(loss.detach()) * graded, count + graded
            found["budgets"].append(attention.budgets.tolist())
        found["losses"].append(total)
        found["tokens"].append(count)
        optimizer.step()
        optimizer.zero_grad()
    return found


def sharded(rank: int, world: int) -> dict[str, list]:
    """FSDP2, layers computed again in the backward pass."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make("llama").train().requires_grad_(True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    mesh = init_device_mesh("cpu", (world,))
    attention, tuner, batches = objects(model, rank, world, "micro_step", batch=4, p=0.6)  # few samples and blocks
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return steps_of(model, optimizer, tuner, attention, batches, lambda loss: loss.backward())


def accelerated(rank: int, world: int) -> dict[str, list]:
    """DDP by accelerate; the loader is left out of prepare."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = make("llama").train().requires_grad_(True)
    attention, tuner, batches = objects(model, rank, world, "step", budget=256, p=0.0)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    return steps_of(model, optimizer, tuner, attention, batches, accelerator.backward)


def main(folder: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo")
    found = {"sharded": sharded(rank, world), "accelerated": accelerated(rank, world)}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
