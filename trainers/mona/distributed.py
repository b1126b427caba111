"""Orthogonalization of matrices that are sharded or replicated over processes: each matrix once, on a single process.

There are two exchanges per shape, for all matrices of that shape at once. The pieces of a matrix are sent to its owner,
which orthogonalizes the whole matrix, and the pieces of the result are sent to all processes that hold them. Owners are
chosen such that the work is evenly distributed. The exchanges of all shapes are in progress while the first products
are computed. Every process computes the same routes from the placements, so that no other communication is needed. The
same parameters must have gradients on every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from effpass.trainers.mona.batches import Piece, scale_of
from effpass.trainers.mona.layout import Part
from effpass.trainers.mona.newton_schulz import NewtonSchulz
from effpass.trainers.mona.sharding import Box, boxes_of_ranks, local, matrix_boxes, process_group

__all__ = ["Exchange", "agree"]


@dataclass(frozen=True)
class Transfer:
    """Piece of a matrix that is sent to another process.

    Attributes:
        parameter: index of the parameter.
        block: block of the piece in the coordinates of the parameter.
        matrix: block of the matrix in the same coordinates.
        slot: index of the matrix at its owner.
    """

    parameter: int
    block: Box
    matrix: Box
    slot: int


@dataclass
class Route:
    """Pieces that this process exchanges with each rank of a group, for all matrices of one shape.

    Attributes:
        group: process group.
        m, n: size of the matrices.
        slots: number of matrices that this process owns.
        parts: for each rank, the pieces that this process sends to it because that rank owns their matrices.
        owned: for each rank, the pieces of the matrices owned by this process that the rank sends.
        results: for each rank, the pieces of the matrices owned by this process that the rank holds.
        held: for each rank, the pieces held by this process whose matrices the rank owns.
    """

    group: Any
    m: int
    n: int
    slots: int
    parts: list[list[Transfer]]
    owned: list[list[Transfer]]
    results: list[list[Transfer]]
    held: list[list[Transfer]]


class Exchange:
    """Orthogonalization over processes; routes are computed once for each set of parameters."""

    def __init__(self) -> None:
        self._routes: dict[Any, tuple[list[Route], list[Box]]] = {}

    def orthogonalize(
        self,
        parameters: Sequence[Tensor],
        updates: Sequence[Tensor],
        parts: Sequence[Sequence[Part]],
        newton_schulz: NewtonSchulz,
        scale: str,
        replicas: Any,
    ) -> list[Piece]:
        """Return what :func:`.batches.orthogonalize` does, from the local parts of the updates; a collective call."""
        found = []
        for kind in dict.fromkeys((update.dtype, update.device) for update in updates):
            own = [i for i, update in enumerate(updates) if (update.dtype, update.device) == kind]
            chosen = [parameters[i] for i in own], [updates[i] for i in own], [parts[i] for i in own]
            found += self._of_one_kind(*chosen, newton_schulz, scale, replicas)
        return found

    def _of_one_kind(
        self,
        parameters: Sequence[Tensor],
        updates: Sequence[Tensor],
        parts: Sequence[Sequence[Part]],
        newton_schulz: NewtonSchulz,
        scale: str,
        replicas: Any,
    ) -> list[Piece]:
        key = tuple(map(id, parameters))
        if key not in self._routes:
            self._routes[key] = _routes(parameters, parts, replicas)
        routes, boxes = self._routes[key]
        work = newton_schulz.work_dtype(updates[0])
        held = torch.bfloat16 if work == torch.float16 else work
        device = updates[0].device
        shares = [update.to(held) for update in updates]
        going = []
        for route in routes:
            pieces = [[shares[t.parameter][t.block.within(boxes[t.parameter])] for t in to] for to in route.parts]
            going.append((route, *_start(pieces, route.owned, held, device, route.group)))
        returning = []
        for route, received, wait in going:
            wait()
            matrices = torch.zeros((route.slots, route.m, route.n), dtype=held, device=device)
            owned = [t for side in route.owned for t in side]
            places = [matrices[t.slot].view(t.matrix.size)[t.block.within(t.matrix)] for t in owned]
            if owned:  # in few launches
                torch._foreach_copy_(places, [f.view(t.block.size) for t, f in zip(owned, received, strict=True)])
            solved = newton_schulz(matrices)
            pieces = [
                [solved[t.slot].reshape(t.matrix.size)[t.block.within(t.matrix)] for t in to] for to in route.results
            ]
            returning.append((route, *_start(pieces, route.held, work, device, route.group)))
        found = []
        for route, received, wait in returning:
            wait()
            factor = scale_of(scale, route.m, route.n)
            for t, flat in zip((t for side in route.held for t in side), received, strict=True):
                own = local(parameters[t.parameter])[t.block.within(boxes[t.parameter])]
                found.append(Piece(own, flat.view(t.block.size), factor))
        return found


def _start(
    pieces: list[list[Tensor]], expected: list[list[Transfer]], dtype: torch.dtype, device: torch.device, group: Any
) -> tuple[list[Tensor], Any]:
    """Start an exchange; return the tensors to receive, in order, and a function that waits until they are received.

    Args:
        pieces: tensors to send to each rank.
        expected: transfers from each rank.
        dtype: dtype of the sent tensors.
        device: device of the tensors.
        group: process group.
    """
    flat = [piece.reshape(-1).to(dtype) for to in pieces for piece in to]
    sent = torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=device)
    sizes = [t.block.numel for side in expected for t in side]
    got = torch.empty(sum(sizes), dtype=dtype, device=device)
    handle = dist.all_to_all_single(
        got,
        sent,
        [sum(t.block.numel for t in side) for side in expected],
        [sum(piece.numel() for piece in to) for to in pieces],
        group=group,
        async_op=True,
    )

    def wait(handle: Any = handle, sent: Tensor = sent) -> None:  # keeps `sent` alive until the exchange is complete
        handle.wait()

    return list(got.split(sizes)) if sizes else [], wait


def _routes(
    parameters: Sequence[Tensor], parts: Sequence[Sequence[Part]], replicas: Any
) -> tuple[list[Route], list[Box]]:
    """Return the routes of all matrices as seen from this process, and its block of each parameter.

    All processes agree on owners and senders.
    """
    found: dict[Any, Route] = {}
    loads: dict[Any, list[float]] = {}
    mine = []
    for number, (parameter, own) in enumerate(zip(parameters, parts, strict=True)):
        group = process_group(parameter, replicas)
        world, me = dist.get_world_size(group), dist.get_rank(group)
        boxes = boxes_of_ranks(parameter, group)
        mine.append(boxes[me])
        load = loads.setdefault(id(group), [0.0] * world)
        for part in own:
            _, m, n = part.matrices
            key = (id(group), m, n)
            if key not in found:
                sides: list[list[list[Transfer]]] = [[[] for _ in range(world)] for _ in range(4)]
                found[key] = Route(group, m, n, 0, *sides)
            for matrix in matrix_boxes(parameter.shape, part):
                _add(found[key], number, matrix, boxes, load, me)
    return list(found.values()), mine


def _add(route: Route, number: int, matrix: Box, boxes: list[Box], load: list[float], me: int) -> None:
    """Choose the owner of a matrix, and add its pieces to a route."""
    overlaps = [box.overlap(matrix) for box in boxes]
    # A rank that holds the whole matrix needs no pieces. The owner is the least loaded of these ranks, or of all ranks.
    whole = [rank for rank, overlap in enumerate(overlaps) if overlap == matrix]
    owner = min(whole or range(len(boxes)), key=lambda rank: (load[rank], rank))
    load[owner] += route.m * route.n * min(route.m, route.n)
    slot = route.slots
    if owner == me:
        route.slots += 1
    holders: dict[Box, list[int]] = {}
    for rank, overlap in enumerate(overlaps):
        if overlap is not None:
            holders.setdefault(overlap, []).append(rank)
    for block, ranks in holders.items():
        sender = owner if owner in ranks else ranks[owner % len(ranks)]
        transfer = Transfer(number, block, matrix, slot)
        if sender == me:
            route.parts[owner].append(transfer)
        if owner == me:
            route.owned[sender].append(transfer)
            for rank in ranks:
                route.results[rank].append(transfer)
        if me in ranks:
            route.held[owner].append(transfer)


def agree(flags: dict[torch.device, Tensor], parameters: Sequence[Any], replicas: Any) -> Tensor | None:
    """Combine the flags of all devices, and of all processes that share parameters; None if there is no flag."""
    found = None
    for flag in flags.values():
        found = flag if found is None else found & flag.to(found.device)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return found
    if replicas is None and all(getattr(p, "device_mesh", None) is None for p in parameters):
        return found
    device = found.device if found is not None else local(parameters[0]).device
    count = torch.ones((), device=device) if found is None else found.to(torch.float32)
    dist.all_reduce(count, op=dist.ReduceOp.MIN)
    return count > 0
