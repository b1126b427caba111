"""Positions of the pieces of a parameter, as boxes in its coordinates, for plain tensors, replicas and DTensors.

:mod:`.distributed` computes from them which pieces of a matrix the processes exchange.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from effpass.core.errors import ModelError
from effpass.trainers.mona.layout import Layout, Part

__all__ = ["Box", "boxes_of_ranks", "is_shared", "local", "local_grad", "matrix_boxes", "process_group"]


@dataclass(frozen=True)
class Box:
    """Rectangular block of a tensor: offset and size along each dimension."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    def overlap(self, other: Box) -> Box | None:
        """Return the intersection of two blocks; None if it is empty."""
        low = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        high = tuple(
            min(a + n, b + m) for a, n, b, m in zip(self.offset, self.size, other.offset, other.size, strict=True)
        )
        size = tuple(h - o for h, o in zip(high, low, strict=True))
        return Box(low, size) if min(size) > 0 else None

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Return the slices of this block in a tensor that holds the block `outer`."""
        return tuple(slice(a - b, a - b + n) for a, b, n in zip(self.offset, outer.offset, self.size, strict=True))


def local(tensor: Any) -> Tensor:
    """Return the part of `tensor` that this process holds."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def local_grad(parameter: Any) -> Tensor:
    """Return the gradient of the part that this process holds, with the placements of the parameter."""
    grad = parameter.grad
    placements = getattr(parameter, "placements", None)
    if placements is not None and grad.placements != placements:
        grad = grad.redistribute(placements=placements)
    return local(grad)


def is_shared(parameter: Any, layout: Layout, replicas: Any) -> bool:
    """Return whether matrices of a parameter are sharded or replicated over processes.

    A stack of experts of which each process holds whole experts is neither.
    """
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return replicas is not None and dist.get_world_size(replicas) > 1
    if mesh.size() == 1:
        return False
    whole_experts = parameter.ndim == 3 and not layout.convolution and (not layout.split or layout.dim != 0)
    along_stack = all(getattr(placement, "dim", None) == 0 for placement in parameter.placements)
    return not (whole_experts and along_stack)


def process_group(parameter: Any, replicas: Any) -> Any:
    """Return the group of the processes over which a shared parameter is distributed."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return replicas
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    return mesh._flatten().get_group()


def boxes_of_ranks(parameter: Any, group: Any) -> list[Box]:
    """Return the block of `parameter` that each rank of `group` holds."""
    whole = Box((0,) * parameter.ndim, tuple(parameter.shape))
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return [whole] * dist.get_world_size(group)
    found = {}
    for coordinate in itertools.product(*map(range, mesh.mesh.shape)):
        found[int(mesh.mesh[coordinate])] = _shard(whole, coordinate, tuple(mesh.mesh.shape), parameter.placements)
    ranks = dist.get_process_group_ranks(group)
    mine = found[dist.get_rank()]
    if mine.size != tuple(local(parameter).shape):
        raise ModelError(
            f"a DTensor of {tuple(parameter.shape)} as {parameter.placements} holds "
            f"{tuple(local(parameter).shape)} here, and {mine.size} was expected"
        )
    return [found[rank] for rank in ranks]


def _shard(whole: Box, coordinate: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Any]) -> Box:
    offset, size = list(whole.offset), list(whole.size)
    plain: list[tuple[int, int]] = []
    strided: list[tuple[int, int]] = []
    for dim, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        if placement.is_partial():
            raise ModelError(f"a parameter placed as {placement} has no values to optimize")
        # With FSDP over tensor parallelism, FSDP shards what mesh dimensions to its right have sharded already.
        (strided if "Strided" in type(placement).__name__ else plain).append((dim, placement.dim))
    for dim, axis in [*plain, *reversed(strided)]:
        share = -(-size[axis] // mesh_shape[dim])
        start = min(share * coordinate[dim], size[axis])
        offset[axis] += start
        size[axis] = min(share, size[axis] - start)
    return Box(tuple(offset), tuple(size))


def matrix_boxes(shape: Sequence[int], part: Part) -> list[Box]:
    """Return the block of each matrix of `part`, in the coordinates of the parameter."""
    block = [*shape]
    block[part.dim] = part.size
    base = [0] * len(block)
    base[part.dim] = part.start
    count, m, _ = part.matrices
    if count == 1:
        return [Box(tuple(base), tuple(block))]
    leading = block[:-2]
    heads = count // math.prod(leading)
    found = []
    for index in itertools.product(*map(range, leading)):
        for head in range(heads):
            offset = [b + i for b, i in zip(base, [*index, head * m, 0], strict=True)]
            found.append(Box(tuple(offset), (*(1 for _ in index), m, block[-1])))
    return found
