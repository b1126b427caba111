"""Area `optimizer` on several GPUs: the step of sharded and of replicated matrices, and what several ranks compute.

    torchrun --standalone --nproc-per-node 4 -m benchmarks optimizer --device cuda --case ranks_822m --json FILE

Each matrix is orthogonalized on one rank. Parameters and gradients are bfloat16 and on all ranks the same; FSDP2 shards
them, or every rank has a copy, as under DDP. The peer is one GPU of the same run, which takes the step alone while the
others wait: its time divided by the number of ranks is what a perfect division of its work would take. Times are those
of the slowest rank, medians over steps; rows are rank 0's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from benchmarks.moe_ranks import over_ranks, start
from benchmarks.optimizer import AREA, Step, in_turn, matmul_rate, parameters, seconds, work
from benchmarks.optimizer_ranks_equal import equality
from benchmarks.rows import Row, row, sync
from effpass.lowering.ops.expert_parallel_exchange import Ranks
from effpass.trainers.mona import MONA

OURS: dict[str, dict[str, Any]] = {"MONA": {}, "Muon (alpha=0)": {"alpha": 0}}
TORCH = "torch.optim.Muon"


def ranks_822m(device: str, smoke: bool) -> Iterator[Row]:
    """16 layers of width 2048 on all ranks, and a small model that they train as one GPU does."""
    ranks = start(device, AREA)
    if ranks is None:
        return
    waiting = dist.new_group(backend="gloo")  # ranks that wait in it leave their GPUs alone
    for rows in (times(ranks, waiting, device, smoke), equality(ranks, waiting, device, smoke)):
        for found in rows:
            if ranks.me == 0:
                yield found


def times(ranks: Ranks, waiting: Any, device: str, smoke: bool) -> Iterator[Row]:
    """Of a step, for each way to hold the matrices."""
    name = "tiny" if smoke else "822m"
    warmup, runs = (1, 2) if smoke else (2, 12)
    matrices = parameters(name, device)
    case = f"{name}: {sum(p.numel() for p in matrices) / 1e6:.0f} M parameters in {len(matrices)} matrices"
    bound = work(name) / matmul_rate(device) / ranks.size * 1e3
    alone: dict[str, float] = {}
    if ranks.me == 0:
        steps: dict[str, Step] = {own: MONA(matrices, lr=1e-5, **options).step for own, options in OURS.items()}
        alone = in_turn({**steps, TORCH: torch.optim.Muon(matrices, lr=1e-5).step}, device, warmup, runs)
        del steps  # and with them their states
    dist.barrier(waiting)
    del matrices

    for held in ("FSDP2", "replicated"):
        matrices = sharded(parameters(name, device), ranks, device) if held == "FSDP2" else parameters(name, device)
        replicas = None if held == "FSDP2" else dist.group.WORLD
        ours = {own: MONA(matrices, lr=1e-5, replicas=replicas, **o) for own, o in OURS.items()}
        functions: dict[str, Step] = {own: optimizer.step for own, optimizer in ours.items()}
        functions |= torch_muon(matrices, held, ranks)
        taken = in_turn(functions, device, warmup, runs, lambda step: of_slowest(step, ranks, device))
        for own in OURS:
            common: dict[str, Any] = {"device": device, "runs": runs, "bound": bound}
            where = f"{case}, {ranks.size} ranks, {held}"
            if alone:  # rank 0's
                yield row(
                    AREA, where, f"step, {own}", taken[own] * 1e3, "ms", peer=alone[own] / ranks.size * 1e3,
                    peer_name="one GPU's time divided by the ranks",
                    note=f"one GPU {alone[own] * 1e3:.4g} ms, {TORCH} there {alone[TORCH] * 1e3:.4g} ms", **common,
                )  # fmt: skip
            if TORCH in taken:
                yield row(
                    AREA, where, f"step, {own}", taken[own] * 1e3, "ms", peer=taken[TORCH] * 1e3, peer_name=TORCH,
                    **common,
                )  # fmt: skip
        del ours, functions, matrices


def of_slowest(step: Step, ranks: Ranks, device: str) -> float:
    """Seconds of a step on the slowest rank, all ranks beginning together."""
    sync(device)
    dist.barrier(ranks.group)
    return over_ranks(seconds(step, device), ranks, device, dist.ReduceOp.MAX)


def sharded(matrices: list[nn.Parameter], ranks: Ranks, device: str) -> list[Any]:
    """The matrices and their gradients as FSDP2 holds them."""
    grads = [matrix.grad for matrix in matrices]
    for matrix in matrices:
        matrix.grad = None
    mesh = init_device_mesh(device, (ranks.size,))
    module: Any = nn.Module()
    module.matrices = nn.ParameterList(matrices)
    fully_shard(module, mesh=mesh)
    found: list[Any] = list(module.parameters())
    for parameter, grad in zip(found, grads, strict=True):
        assert grad is not None
        parameter.grad = distribute_tensor(grad, mesh, parameter.placements)
    return found


def torch_muon(matrices: list[Any], held: str, ranks: Ranks) -> dict[str, Step]:
    """The step of torch.optim.Muon, if it takes these parameters."""
    try:
        step = torch.optim.Muon(matrices, lr=1e-5).step
        step()
    except Exception as error:  # of any kind, and on all ranks alike
        if ranks.me == 0:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"{AREA} | {TORCH} is left out of {held}: {reason}", flush=True)
        return {}
    return {TORCH: step}
