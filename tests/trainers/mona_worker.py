"""What each process of test_mona_distributed runs: some steps of a sharded model, its weights to a file.

mona_worker.py KIND,KIND,… FOLDER     with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set; FOLDER/KIND.pt
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
from torch import nn

from effpass.trainers import MONA
from effpass.trainers.mona import Layout


class Net(nn.Module):
    """Odd sizes, so that shards are uneven and some are empty; a stack of experts; a fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.qkv = nn.Linear(6, 15, bias=False)
        self.up = nn.Linear(15, 7)
        self.experts = nn.Parameter(torch.randn(4, 7, 5) * 0.3)
        self.narrow = nn.Linear(5, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.up(torch.tanh(self.qkv(self.embed(ids)))))
        return self.narrow(torch.tanh(torch.einsum("bd,edf->bf", x, self.experts)))


OVERRIDES = {"qkv.weight": Layout(split=(6, 3, 6)), "up.weight": Layout(heads=7)}


def network() -> Net:
    torch.manual_seed(0)
    return Net().double()


def optimizer(model: nn.Module, **options) -> MONA:
    return MONA(model, lr=0.05, overrides=OVERRIDES, **options)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 11, (8,), generator=generator)
    return ids, torch.randn(8, 3, generator=generator, dtype=torch.float64)


def train(model: nn.Module, opt: MONA, steps: range, share: slice = slice(None), reduce=None) -> None:
    for step in steps:
        ids, target = batch(step)
        opt.zero_grad()
        loss = (model(ids[share]) - target[share]).square().mean()
        loss.backward()
        if reduce is not None:
            reduce(model)
        opt.step()


def sharded(model: Net, *shape: int) -> Net:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = ("replicate", "shard")[-len(shape) :]
    fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    return model


def fsdp(world: int, share: slice) -> dict[str, torch.Tensor]:
    model = sharded(network(), world)
    train(model, optimizer(model), range(3), share)
    return weights(model)


def hsdp(world: int, share: slice) -> dict[str, torch.Tensor]:
    model = sharded(network(), 2, world // 2)
    train(model, optimizer(model), range(3), share)
    return weights(model)


def ddp(world: int, share: slice) -> dict[str, torch.Tensor]:
    def average(module: nn.Module) -> None:
        for parameter in module.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world

    model = network()
    train(model, optimizer(model, replicas=dist.group.WORLD), range(3), share, average)
    return weights(model)


def placed(world: int, share: slice) -> dict[str, torch.Tensor]:
    """Columns of tensor parallelism, shards in two dimensions, whole experts on their processes; equal data."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    line = init_device_mesh("cpu", (world,), mesh_dim_names=("x",))
    grid = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("a", "b"))
    places = {
        "qkv.weight": (line, [Shard(1)]), "up.weight": (grid, [Shard(0), Shard(1)]), "experts": (line, [Shard(0)]),
        "narrow.weight": (grid, [Replicate(), Shard(0)]),
    }  # fmt: skip
    twin = network()
    own = {
        name: nn.Parameter(distribute_tensor(p.detach(), *places.get(name, (line, [Replicate()]))))
        for name, p in twin.named_parameters()
    }
    opt = by_name(own.items())
    for step in range(3):
        ids, target = batch(step)
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                parameter.copy_(own[name].data.full_tensor())
        twin.zero_grad()
        (twin(ids) - target).square().mean().backward()
        for name, parameter in twin.named_parameters():
            own[name].grad = distribute_tensor(parameter.grad, own[name].device_mesh, own[name].placements)
        opt.step()
    return {name: parameter.data.full_tensor() for name, parameter in own.items()}


def by_name(named) -> MONA:
    return MONA(list(named), lr=0.05, overrides={**OVERRIDES, "embed.weight": "adamw"})


def checkpoint(world: int, share: slice) -> dict[str, torch.Tensor]:
    """Three steps, a checkpoint, two more."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    model = sharded(network(), world)
    opt = optimizer(model)
    train(model, opt, range(3), share)
    model_state, state = get_state_dict(model, opt, options=StateDictOptions(full_state_dict=True))
    saved = copy.deepcopy({"model": model_state, "optimizer": state})
    train(model, opt, range(3, 5), share)
    return {**saved, "after": weights(model)}


def nan(world: int, share: slice) -> dict[str, bool]:
    """One process has a gradient that is not finite."""
    model = sharded(network(), world)
    opt = optimizer(model, nan_policy="skip")
    ids, target = batch(0)
    (model(ids) - target).square().mean().backward()
    before = weights(model)
    if dist.get_rank() == 1:
        model.qkv.weight.grad.to_local().fill_(float("nan"))
    opt.step()
    same = all(torch.equal(value, before[name]) for name, value in weights(model).items())
    return {"skipped": opt.skipped == 1, "same": same}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (p.data.full_tensor() if hasattr(p.data, "full_tensor") else p.data).clone()
        for name, p in model.named_parameters()
    }


def main() -> None:
    kinds, folder = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for kind in kinds.split(","):
        result = globals()[kind](world, slice(rank * 8 // world, (rank + 1) * 8 // world))
        if rank == 0:
            torch.save(result, f"{folder}/{kind}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
