"""What each process of test_balance_context runs: two micro-batches at a time, each of them on two processes.

balance_context_worker.py FOLDER     with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set; FOLDER/RANK.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from families import make
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening

from effpass.runtime.context_parallel import shard
from effpass.runtime.routed_attention import install
from effpass.trainers.balance import BalancedBatches, SparsityTuner, Tuning, budgets_around, documents_of
from effpass.trainers.balance.table import from_flops

BLOCK, BUDGET, STEPS, SHARING = 16, 96, 4, 2
LENGTHS = [16, 203, 41, 24, 181, 60, 30, 97, 150, 21, 44, 33, 210, 18, 90, 75]


def dataset() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(3, 96, (n,), generator=generator).tolist()} for n in LENGTHS]


def train(mesh) -> dict[str, object]:
    """Some steps; what was planned, how the model attended, and its losses on several processes and on one."""
    model = make("llama").train().requires_grad_(True)
    tuning = Tuning(budgets_around(BUDGET, BLOCK), BUDGET, p=0.6)
    attention = install(model, block=BLOCK, budget=BUDGET, max_budget=tuning.budgets[-1])
    twin = make("llama").train()  # on one process
    twin_attention = install(twin, block=BLOCK, budget=BUDGET, max_budget=tuning.budgets[-1])
    table = from_flops(
        (32, 128, 256), tuning.budgets, layers=2, attention_width=4096 // SHARING, parameters=10**5 // SHARING, rate=1e9
    )
    data, context = mesh["data"], mesh["context"]
    tuner = SparsityTuner(model, attention, table, tuning, group=data.get_group(), every=1)
    batches = BalancedBatches(
        LENGTHS, table, batch=8, micro_steps=2, max_tokens=600, rank=data.get_local_rank(), world=data.size(),
        expected=tuner.expected,
    )  # fmt: skip
    loader = DataLoader(dataset(), batch_sampler=batches, collate_fn=DataCollatorWithFlattening())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found: dict[str, list] = {"plans": [], "seen": [], "read": [], "split": [], "whole": []}
    for step in range(STEPS):
        if step % batches.steps == 0:
            rest = iter(loader)
        micro_batches = [next(rest) for _ in range(batches.micro_steps)]
        documents = [documents_of(batch) for batch in micro_batches]
        plan = tuner.begin_step(documents)
        found["plans"].append([plan.budgets.tolist(), plan.seconds.tolist()])
        found["read"].append(documents)
        graded = torch.tensor(sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches))
        dist.all_reduce(graded, group=data.get_group())
        for batch in micro_batches:
            part = shard(batch, context)
            loss = model(**part, num_items_in_batch=graded, use_cache=False).loss
            (loss * dist.get_world_size()).backward()  # what follows is a mean over all processes
            found["seen"].append(attention.budgets.tolist())
            total = loss.detach().clone()
            dist.all_reduce(total, group=context.get_group())
            found["split"].append(float(total))
            twin.load_state_dict(model.state_dict())
            twin_attention.budgets = torch.tensor(found["seen"][-1], dtype=torch.int32)
            with torch.no_grad():
                found["whole"].append(float(twin(**batch, num_items_in_batch=graded, use_cache=False).loss))
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
    return {**found, "metrics": {k: v for k, v in tuner.metrics().items() if "_ms" not in k}}


def main(folder: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (world // SHARING, SHARING), mesh_dim_names=("data", "context"))
    found = train(mesh)
    # As where a group carries no CPU tensors: each of the groups makes one beside it.
    known = dist.get_backend_config
    dist.get_backend_config = lambda group=None: "cuda:nccl"
    again = train(mesh)
    dist.get_backend_config = known
    found["beside"] = again["plans"] == found["plans"]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
