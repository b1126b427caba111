"""The message that ranks exchange before each step: lengths of their documents, and coverage measured in the last step.

The tuner (:mod:`.tuner`) plans the step from the messages of all ranks.
"""

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
    """Message of one rank.

    Attributes:
        documents: lengths of the documents of each of its micro-batches in the next step.
        longest: length of the longest document of the micro-batch whose coverage was measured; 0 if none was measured.
        coverage: coverage of each layer and budget in that micro-batch `[L, K]`; zeros if none was measured.
    """

    documents: list[list[int]]
    longest: int
    coverage: NDArray[np.float64]


class Exchange:
    """Exchange of messages between the ranks that read different data.

    Messages are CPU tensors, so that the exchange does not wait for a device. They use the given group if it has a CPU
    backend (gloo, or torchrun's ``cpu:gloo,cuda:nccl``), and otherwise a gloo group of the same ranks, which is created
    on all of them at the same time.

    Args:
        group: process group; None for all processes, or for a single process without any group.
        shape: shape (L, K) of the coverage.
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
            # Other ranks may be creating groups of their own at the same time, as in context parallelism.
            self._group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)

    def __call__(self, told: Told) -> list[Told]:
        """Send a message and return the messages of all ranks in rank order; a collective call.

        Raises:
            EffpassError: if a rank has no micro-batch or an empty one, or if the ranks have different numbers of
                micro-batches; raised on all ranks.
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
        most_documents = max(int(size[1]) for size in sizes)
        numbers = [*counts, *documents, *[0] * (most_documents - len(documents)), told.longest]
        bits = told.coverage.astype(np.float64).ravel().view(np.int64)
        gathered = self._gather(np.concatenate([np.array(numbers, dtype=np.int64), bits]))
        return [self._read(flat, int(size[0]), most_documents) for flat, size in zip(gathered, sizes, strict=True)]

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
