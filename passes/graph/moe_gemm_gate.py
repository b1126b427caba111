"""Recognize the gate between the two products of an expert, in the ways in which models write it.

    h = act(min(g, limit)) · (clamp(u, -limit, limit) + offset)         act(g) = g · σ(α g), GELU or ReLU

g (gate) and u (up) are the two halves of one value [P, 2 F], or its even and odd columns, or two separate values. P is
the number of pairs of a token and an expert, F the intermediate size of an expert. `moe_gemm` passes the recognized
parameters to `effpass::moe_ffn`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effpass.passes.graph.same_value import source

__all__ = ["Gate", "gate_at", "gate_of_two"]

aten = torch.ops.aten

_ACTIVATIONS = {aten.silu.default: "silu", aten.relu.default: "relu"}
_TO_THE_END = 2**62


@dataclass(frozen=True)
class Gate:
    """A gate. `alpha`, `limit` and `offset` are each a float or the node of one.

    Attributes:
        projected: value that holds both gate and up, [P, 2 F]; the gate alone if the two are separate values.
        parts: nodes of gate and of up.
        activation: name of the activation as `effpass::moe_ffn` takes it.
        alpha: factor α inside the sigmoid; 1 for GELU and ReLU.
        limit: bound on gate and up; 0 for no bound.
        offset: number that is added to up.
        interleaved: whether gate and up are the even and odd columns of `projected` instead of its halves.
    """

    projected: Node
    parts: tuple[Node, Node]
    activation: str
    alpha: Any
    limit: Any
    offset: Any
    interleaved: bool


def gate_at(hidden: Any) -> Gate | None:
    """Return the gate over one value [P, 2 F] that computes `hidden`; None if `hidden` is anything else."""
    for active, other in _factors(source(hidden)):
        found = _activation(source(active))
        if found is None:
            continue
        gate, name, alpha = found
        up, offset = _sum(source(other))
        gate, gate_limits = _clamp(gate)
        up, up_limits = _clamp(up)
        limit = gate_limits[1] if gate_limits[0] is None else None
        if limit is None or not (_equal(limit, up_limits[1]) and _opposite(limit, up_limits[0])):
            continue
        first, second = _half(gate), _half(up)
        if first is None or second is None or first[0] is not second[0]:
            continue
        if (first[1], second[1]) in (("first", "second"), ("even", "odd")):
            return Gate(first[0], (gate, up), name, alpha, limit, offset, first[1] == "even")
    return None


def gate_of_two(hidden: Any) -> tuple[Gate | None, tuple[Node, ...]]:
    """Match a gate over two separate values, without limit and offset.

    Returns:
        The gate, and the nodes of gate and up; None and an empty tuple if `hidden` is anything else.
    """
    for active, up in _factors(source(hidden)):
        found = _activation(source(active))
        if found is not None and isinstance(up, Node):
            gate, up = found[0], source(up)
            return Gate(gate, (gate, up), found[1], found[2], 0.0, 0.0, False), (gate, up)
    return None, ()


def _factors(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the operands of an elementwise product, in both orders."""
    if isinstance(node, Node) and node.target is aten.mul.Tensor:
        first, second = node.args
        yield first, second
        yield second, first


def _activation(node: Any) -> tuple[Any, str, Any] | None:
    """Match an activation; return its input, its name and α."""
    if not isinstance(node, Node):
        return None
    if node.target in _ACTIVATIONS:
        return source(node.args[0]), _ACTIVATIONS[node.target], 1.0
    if node.target is aten.gelu.default:
        name = {"none": "gelu", "tanh": "gelu_tanh"}[str(node.kwargs.get("approximate", "none"))]
        return source(node.args[0]), name, 1.0
    for x, sigmoid in _factors(node):
        if isinstance(sigmoid, Node) and sigmoid.target is aten.sigmoid.default:
            inner = source(sigmoid.args[0])
            if inner is source(x):
                return inner, "silu", 1.0
            for scaled, alpha in _factors(inner):
                if source(scaled) is source(x) and _is_number(alpha):
                    return source(x), "silu", alpha
    return None


def _sum(node: Any) -> tuple[Any, Any]:
    """Return the terms of ``up + number``; `node` and 0 if `node` is anything else."""
    if isinstance(node, Node) and node.target is aten.add.Tensor and not node.kwargs and _is_number(node.args[1]):
        return source(node.args[0]), node.args[1]
    return node, 0.0


def _clamp(node: Any) -> tuple[Any, tuple[Any, Any]]:
    """Return the input of a clamp and its bounds; if `node` is no clamp, `node` and the bounds of a limit of 0."""
    if not isinstance(node, Node) or node.target is not aten.clamp.default:
        return node, (None, 0.0)
    x, low, high = (*node.args, None, None)[:3]
    return source(x), (node.kwargs.get("min", low), node.kwargs.get("max", high))


def _half(node: Any) -> tuple[Node, str] | None:
    """Return the value [P, 2 F] of which `node` is a half, and the name of that half."""
    if not isinstance(node, Node) or not node.args or not isinstance(node.args[0], Node):
        return None
    if node.target is operator.getitem:
        return _piece(node.args[0], node.args[1])
    if node.target is not aten.slice.Tensor:
        return None
    given: list[Any] = [*node.args, *(0, 0, _TO_THE_END, 1)[len(node.args) - 1 :]]
    first, dim, start, end, step = given
    whole = source(first)
    value = whole.meta["val"]
    width = value.shape[-1]
    if dim not in (-1, value.dim() - 1) or not isinstance(width, int) or width % 2:
        return None
    span = range(*slice(start, min(end, width), step).indices(width))
    names = {
        range(0, width, 2): "even",
        range(1, width, 2): "odd",
        range(width // 2): "first",
        range(width // 2, width): "second",
    }
    return (whole, names[span]) if span in names else None


def _piece(parts: Node, place: Any) -> tuple[Node, str] | None:
    """Return the value that `parts` splits in two along the last dimension, and the name of the half at `place`."""
    if parts.target not in (aten.chunk.default, aten.split.Tensor):
        return None
    given: Any = parts.args
    whole, size, dim = source(given[0]), given[1], (*given, 0)[2]
    value = whole.meta["val"]
    width = value.shape[-1]
    pieces = size if parts.target is aten.chunk.default else width // size
    if dim not in (-1, value.dim() - 1) or pieces != 2 or width % 2:
        return None
    return whole, ("first", "second")[place]


def _is_number(value: Any) -> bool:
    found = value.meta.get("val") if isinstance(value, Node) else value
    return isinstance(found, (int, float, torch.SymInt, torch.SymFloat))


def _number(value: Any) -> Any:
    return value.meta["val"] if isinstance(value, Node) else value


def _equal(a: Any, b: Any) -> bool:
    return b is not None and bool(statically_known_true(_number(a) == _number(b)))


def _opposite(limit: Any, low: Any) -> bool:
    """Whether the lower bound `low` is ``-limit``. A limit of 0 stands for no bound, so `low` must be None."""
    if low is None:
        return isinstance(limit, float) and limit == 0
    return bool(statically_known_true(_number(low) == -_number(limit)))
