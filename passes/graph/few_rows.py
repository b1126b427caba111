"""Checks whether a kernel for few tokens may replace several operators of a program.

The graph passes that fuse kernel launches call these functions in `find`. Each function returns None if the rewrite is
possible, and otherwise the reason for a :class:`~effpass.core.report.Refusal`. A *row* is one vector along the last
dimension of an operator's input, usually the hidden state of one token; with few rows, as in a decode step, the time of
a matrix product is the time to read its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from effpass.core.report import Refusal

if TYPE_CHECKING:
    from effpass.core.matching import Surroundings
    from effpass.core.program import Program

__all__ = ["MAX_ROWS", "HasKernel", "why_no_kernel", "why_not_here", "why_not_program"]

#: Maximum number of rows for which reading the weights dominates the time of a matrix product. With more rows, an
#: unfused library kernel is the better choice.
MAX_ROWS = 64

#: Function that tells whether an operator has a kernel for a device, a dtype of the input, and a number of rows.
HasKernel = Callable[[torch.device, torch.dtype, int], bool]


def why_not_program(program: Program) -> Refusal | None:
    """Return a refusal if the program records gradients: the backward of a fused operator recomputes its forward."""
    if not program.grad_enabled:
        return None
    first = program.first_computation()
    return Refusal(first.name, "the program records gradients", "run the model under torch.no_grad()")


def why_no_kernel(
    x: Node,
    sizes: Sequence[int | torch.SymInt],
    others: Iterable[Node],
    has_kernel: HasKernel,
    most: float = MAX_ROWS,
) -> tuple[str, str] | None:
    """Return the reason why no kernel supports `x`, together with a hint; None if a kernel does.

    Args:
        x: input of the operator.
        sizes: sizes of the dimensions of `x` whose product is the number of rows.
        others: weights and other operands, which must be plain tensors of the dtype of `x`.
        has_kernel: function that tells whether the operator has a kernel.
        most: maximum number of rows.
    """
    value = x.meta["val"]
    for node in (x, *others):
        other = node.meta["val"]
        if type(other) is not FakeTensor or not other.is_floating_point():
            kind = type(other).__name__ if type(other) is not FakeTensor else str(other.dtype).removeprefix("torch.")
            return f"{node.name} is a {kind}, which the kernel does not read", ""
        if other.dtype != value.dtype:
            return f"{node.name} is {_short(other)} and {x.name} is {_short(value)}", "give the model one dtype"
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) < len(sizes):
        return "the number of rows is dynamic", "compile the decode step with dynamic=False"
    rows = math.prod(known)
    if rows > most:
        return f"{rows} rows, and the kernel is for up to {most}", ""
    if not has_kernel(value.device, value.dtype, rows):
        what = f"no kernel for {value.device.type}"
        if value.device.type != "cpu":
            return f"{what} in {_short(value)}", ""
        return f"{what}: this fuses launches on a GPU", "move the model to a GPU"
    return None


def _short(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def why_not_here(surroundings: Surroundings, nodes: Iterable[Node], here: Node) -> str | None:
    """Return the reason why `nodes` can't be computed at the position of `here` instead; None if they can.

    Nodes may move in either direction, unless a storage that one of them reads is written in between, or a no-grad or
    autocast region begins or ends in between.

    Args:
        surroundings: order of reads, writes and region boundaries in the program.
        nodes: nodes whose computation moves.
        here: node at whose position they would be computed.
    """
    at = surroundings.position[here]
    places = [at]
    for node in nodes:
        places.append(surroundings.position[node])
        for root, seen in surroundings.epochs.get(node, {}).items():
            if sum(write < at for write in surroundings.writes[root]) != seen:
                return f"{root.name} is written between {node.name}, which reads it, and {here.name}"
    for border in surroundings.borders:
        if min(places) < surroundings.position[border] < max(places):
            return f"{border.name} lies inside: a border of no_grad or autocast"
    return None
