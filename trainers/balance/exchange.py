"""The one message of a step: what each rank's micro-batches are, and what their layers covered in the step before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from effpass.core.errors import EffpassError

__all__ = ["Exchange", "Told"]


@dataclass(frozen=True)
class Told:
    """What a rank says.

    Attributes:
        documents: lengths of the documents of each of its micro-batches in the step to come.
        longest: of the micro-batch whose coverage was measured; 0 where none was.
        coverage: of its layers and budgets `[L, K]`; zeros where none was measured.
    """

    documents: list[list[int]]
    longest: int
    coverage: NDArray[np.float64]


class Exchange:
    """Between the ranks that read other data.

    Numbers go by CPU tensors, so that nothing waits for a device: by the group itself where it carries them (gloo, or
    torchrun's ``cpu:gloo,cuda:nccl``), else by one of gloo that is made beside it, on all of its ranks at once.

    Args:
        group: a process group; None for all processes, or for none where there is no group at all.
        shape: of the coverage, (L, K).
    """

    def __init__(self, group: Any, shape: tuple[int, int]) -> None:
        self._shape = shape
        self._group = None
        self.rank, self.world = 0, 1
        if not dist.is_initialized():
            return
        self._group = group or dist.group.WORLD
        self.rank, self.world = dist.get_rank(self._group), dist.get_world_size(self._group)
        if "cpu:" not in dist.get_backend_config(self._group):
            ranks = dist.get_process_group_ranks(self._group)
            # Other ranks make groups of their own at the same time, as in context parallelism.
            self._group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)

    def __call__(self, told: Told) -> list[Told]:
        """What all say, by rank; a collective call.

        Raises:
            EffpassError: a micro-batch is empty, or ranks have other numbers of them; on all ranks alike.
        """
        counts = [len(micro) for micro in told.documents]
        is_whole = bool(counts) and all(counts)
        sizes = self._gather(np.array([len(counts) if is_whole else 0, sum(counts)], dtype=np.int64))
        micro_batches = [int(size[0]) for size in sizes]
        if 0 in micro_batches:
            raise EffpassError(
                f"rank {micro_batches.index(0)} has a micro-batch without documents, and the others would wait for it",
                hint="BalancedBatches leaves no rank empty",
            )
        if len(set(micro_batches)) > 1:
            raise EffpassError(
                f"ranks have {micro_batches} micro-batches in a step, expected as many on each",
                hint="BalancedBatches gives each rank micro_steps of them",
            )
        if self.world == 1:
            return [told]
        documents = [length for micro in told.documents for length in micro]
        most = max(int(size[1]) for size in sizes)
        numbers = [*counts, *documents, *[0] * (most - len(documents)), told.longest]
        bits = told.coverage.astype(np.float64).ravel().view(np.int64)
        every = self._gather(np.concatenate([np.array(numbers, dtype=np.int64), bits]))
        return [self._read(flat, int(size[0]), most) for flat, size in zip(every, sizes, strict=True)]

    def _gather(self, own: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        if self.world == 1:
            return [own]
        found = [torch.empty(own.shape, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(found, torch.from_numpy(own), group=self._group)
        return [tensor.numpy() for tensor in found]

    def _read(self, flat: NDArray[np.int64], micro_batches: int, most: int) -> Told:
        counts, documents = flat[:micro_batches], flat[micro_batches : micro_batches + most]
        ends = np.cumsum(counts)
        split = [documents[end - count : end].tolist() for end, count in zip(ends, counts, strict=True)]
        coverage = flat[micro_batches + most + 1 :].view(np.float64).reshape(self._shape)
        return Told(split, int(flat[micro_batches + most]), coverage)
