"""Where a kernel for few rows may stand in for several operators, and where the program's order lets it."""

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

#: Rows up to which reading the weights is what takes the time. Beyond, a product by itself is better with a library.
MAX_ROWS = 64

#: Whether an operator has a kernel: device, type of the input, rows.
HasKernel = Callable[[torch.device, torch.dtype, int], bool]


def why_not_program(program: Program) -> Refusal | None:
    """A refusal for a program that records gradients: fused, it would compute everything twice."""
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
    """Why no kernel takes the rows of `x`, with a hint; None when one does.

    Args:
        x: the input.
        sizes: those of its dimensions that make rows.
        others: weights and other operands; they must be ordinary tensors of x's type.
        has_kernel: asks the operator.
        most: rows.
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
    """Why the work of `nodes` can't be done at `here`, earlier or later than it was; None when it can.

    It can't when a storage that one of them reads is written in between, or where a region of no_grad or autocast
    begins or ends in between.
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
