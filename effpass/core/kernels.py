"""Groups the operators of a program into kernels, as a compiler such as Inductor would fuse them.

1. A view costs nothing.
2. Matrix products, attention, sorting and operators from outside PyTorch are kernels of their own.
3. Other operators (pointwise, reductions, copies) that are connected, and lie between the same kernels of rule 2, form
   one kernel. Values that are used only inside it do not touch memory.
4. A pointwise group that only kernels of rule 3 read is recomputed inside each of them, and is not a kernel.

This is a model of a compiler, not its actual schedule: Inductor may split a large group, or join groups that share an
input. The kernels are the terms of the prediction in :mod:`effpass.core.roofline`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch.fx import Node

from effpass.core.cost import NodeCost, node_costs, weight_nodes
from effpass.core.flops import Reading, Size, hinted, larger, numel, symbolic, values_of

if TYPE_CHECKING:
    from effpass.core.program import Program

__all__ = ["Kernel", "kernels"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Kernel:
    """Operators that run as one kernel.

    Attributes:
        kind: ``"matmul"``, ``"attention"``, ``"fused"`` or ``"other"``.
        nodes: operators in graph order, without views.
        flops: number of floating-point operations; a multiply-add counts as two.
        weights: bytes of weights read.
        cache: bytes read of inputs that the program writes in place or extends (a KV cache).
        read: bytes of everything else read from memory outside the kernel.
        written: bytes written that are read outside the kernel.
    """

    kind: Literal["matmul", "attention", "fused", "other"]
    nodes: tuple[Node, ...]
    flops: Size
    weights: Size
    cache: Size
    read: Size
    written: Size

    @property
    def bytes(self) -> Size:
        return self.weights + self.cache + self.read + self.written


def kernels(program: Program, size: Reading = symbolic) -> list[Kernel]:
    """The kernels of `program`, followed by those of its bodies, each in graph order."""
    return [k for part in (program, *program.bodies) for k in _kernels(part, size)]


def _kernels(program: Program, size: Reading) -> Iterator[Kernel]:
    costs = {cost.node: cost for cost in node_costs(program, size)}
    groups = _groups([c for c in costs.values() if c.kind != "free"])
    readers = _readers(costs)
    outputs = {costs[n].base if n in costs else n for n in program.graph.output_node().all_input_nodes}
    weights, cache = weight_nodes(program), _cache_nodes(program, costs)
    for members in groups:
        inside = {c.node for c in members}
        outside = {c.node: [r for r in readers.get(c.node, ()) if r.node not in inside] for c in members}
        kept = [c for c in members if outside[c.node] or c.node in outputs or c.base not in inside]
        if members[0].kind == "fusible" and _recomputed(members, kept, outside, outputs):
            continue
        read: dict[Node, Size] = {}
        for cost in members:
            for base, count in cost.reads.items():
                if base not in inside:
                    read[base] = larger(read.get(base, 0), count)
        kind = members[0].kind
        yield Kernel(
            "fused" if kind == "fusible" else kind,  # type: ignore[arg-type]
            tuple(c.node for c in members),
            sum(c.flops for c in members),
            sum(count for base, count in read.items() if base in weights),
            sum(count for base, count in read.items() if base in cache),
            sum(count for base, count in read.items() if base not in weights and base not in cache),
            sum(c.written for c in kept),
        )


def _groups(costs: list[NodeCost]) -> list[list[NodeCost]]:
    """Apply rules 2 and 3: group connected fusible operators that have the same depth.

    The depth (`level`) of a value is the largest number of kernels of rule 2 on a path to it.
    """
    level: dict[Node, int] = {}  # depth of the value, or of the last write to it
    group: dict[Node, list[NodeCost]] = {}
    for cost in costs:
        before = [*cost.reads, cost.base] if cost.base is not cost.node else list(cost.reads)
        depth = max((level.get(base, 0) for base in before), default=0)
        members = [cost]
        if cost.kind == "fusible":
            for base in cost.reads:
                joined = group.get(base, members)
                if joined is not members and joined[0].kind == "fusible" and level[base] == depth:
                    joined += members
                    for other in members:
                        group[other.node] = joined
                    members = joined
        else:
            depth += 1
        group[cost.node] = members
        level[cost.node] = level[cost.base] = depth
    distinct = {id(members): members for members in group.values()}
    order = {cost.node: i for i, cost in enumerate(costs)}
    grouped = [sorted(members, key=lambda c: order[c.node]) for members in distinct.values()]
    return sorted(grouped, key=lambda members: order[members[-1].node])


def _readers(costs: dict[Node, NodeCost]) -> dict[Node, list[NodeCost]]:
    """The operators that read the memory of each node."""
    readers: dict[Node, list[NodeCost]] = {}
    for cost in costs.values():
        for base in cost.reads:
            readers.setdefault(base, []).append(cost)
    return readers


def _recomputed(
    members: list[NodeCost], kept: list[NodeCost], outside: dict[Node, list[NodeCost]], outputs: set[Node]
) -> bool:
    """Whether rule 4 applies to the group `members`."""
    if any(c.node in outputs or c.base is not c.node or _reduces(c) for c in members):
        return False
    return bool(kept) and all(r.kind == "fusible" for c in kept for r in outside[c.node])


def _reduces(cost: NodeCost) -> bool:
    """Whether an operator has fewer output elements than input elements; recomputing it would read the input again."""
    most = max((numel(v, hinted) for n in cost.node.all_input_nodes for v in values_of(n)), default=0)
    return sum(numel(v, hinted) for v in values_of(cost.node)) < most


def _cache_nodes(program: Program, costs: dict[Node, NodeCost]) -> set[Node]:
    """Floating-point inputs that the program writes in place or extends: KV caches and recurrent states."""
    inputs = set(program.graph.find_nodes(op="placeholder")) - weight_nodes(program)
    touched = {c.base for c in costs.values() if c.kind != "free" and c.base is not c.node}
    touched |= {base for c in costs.values() if c.node.target is aten.cat.default for base in c.reads}
    return {n for n in inputs & touched if all(v.is_floating_point() for v in values_of(n))}
