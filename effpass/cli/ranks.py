"""Commands under torchrun: one process a device, in one process group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effpass.core.recipe import Recipe

__all__ = ["Place", "placed", "process_group", "processes"]


@dataclass(frozen=True)
class Place:
    """Where a command's process works.

    Attributes:
        loads_on: the device that a model is loaded on.
        runs_on: the device that it runs on.
        writes: whether this process writes what all have found.
    """

    loads_on: str
    runs_on: str
    writes: bool


def processes() -> int:
    """How many torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def placed(recipe: Recipe | None, device: str) -> Iterator[Place]:
    """The place of this process. A recipe that spreads the model over processes has a process group meanwhile.

    All its processes draw the same random numbers.
    """
    if recipe is None or not any(pass_.over_ranks for pass_ in recipe.build()):
        yield Place(device, device, True)
        return
    with process_group(device) as own:
        import torch
        import torch.distributed as dist

        seed = [torch.seed() % 2**63]
        dist.broadcast_object_list(seed, src=0)
        torch.manual_seed(seed[0])
        # Loaded on the CPU: a GPU is to hold its part of the model alone.
        yield Place("cpu", own, dist.get_rank() == 0)


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """The group of the processes that torchrun started, for as long as it is needed.

    Args:
        device: ``cpu``, or ``cuda``, of which each process gets its own.

    Yields:
        The device of this process.

    Raises:
        EffpassError: there are more processes than GPUs, or one GPU is named for all.
    """
    import torch
    import torch.distributed as dist

    from effpass.core.errors import EffpassError

    kind, _, index = device.partition(":")
    if kind == "cuda":
        local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if index:
            raise EffpassError(
                f"--device {device} for {processes()} processes", hint="--device cuda gives each its own"
            )
        if local >= found:
            raise EffpassError(
                f"torchrun started process {local} on this machine, which has {found} GPUs",
                hint="torchrun --nproc-per-node starts as many processes as there are GPUs, or fewer",
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()
