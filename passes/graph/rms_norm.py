"""Recognize RMSNorm in a program, in the ways in which models write it.

    n(x) = x / √(mean(x²) + ε) · (offset + weight)          https://arxiv.org/abs/1910.07467

`torch.nn.RMSNorm` is traced to one node. The models of transformers compute the norm in separate steps: with `rsqrt` or
a power, with the weight applied before or after the cast back to the dtype of x, and in Gemma with 1 added to the
weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from effpass.passes.graph.same_value import cast_of, dtype_of, source

__all__ = ["RMSNorm", "rms_norm_at"]

aten = torch.ops.aten

_Parts: TypeAlias = "tuple[Any, Any, Any, float]"  # x, weight, ε, offset


@dataclass(frozen=True)
class RMSNorm:
    """One RMSNorm over the last dimension.

    Attributes:
        node: node that computes the normalized value, of the same dtype as `x`.
        x: input of the norm, `[..., D]`.
        weight: weight of the norm, `[D]`, of the same dtype as `x`.
        eps: ε.
        offset: number that is added to the weight; 1 in Gemma, otherwise 0.
        inner: nodes between the inputs and the output of the norm, `node` included.
    """

    node: Node
    x: Node
    weight: Node
    eps: float
    offset: float
    inner: frozenset[Node]


def rms_norm_at(node: Any) -> RMSNorm | None:
    """Return the RMSNorm that computes `node`; None if `node` is anything else."""
    node = source(node)
    if not isinstance(node, Node) or not isinstance(node.meta.get("val"), Tensor):
        return None
    parts = _whole(node) if node.target is aten.rms_norm.default else _spelled_out(node)
    if parts is None:
        return None
    x, weight, eps, offset = parts
    if not (isinstance(x, Node) and isinstance(weight, Node) and isinstance(eps, float)):
        return None  # without a weight, or with the default ε, which depends on the version of torch
    value = weight.meta["val"]
    if value.shape != x.meta["val"].shape[-1:] or not value.dtype == dtype_of(x) == dtype_of(node):
        return None
    return RMSNorm(node, x, weight, eps, offset, frozenset(_between(node, {x, weight})))


def _whole(node: Node) -> _Parts | None:
    x, shape, weight, eps = (*node.args, None, None)[:4]
    return (source(x), source(weight), eps, 0.0) if len(shape) == 1 else None  # type: ignore[arg-type]


def _spelled_out(node: Node) -> _Parts | None:
    dtype = dtype_of(node)
    for normal, scale in _factors(_uncast(node)):
        for value, inverse in _factors(_uncast(normal)):
            squared, eps = _inverse_root(_uncast(inverse))
            x = _of_type(squared, dtype)
            if x is not None and _of_type(value, dtype) is x:
                weight, offset = _weight_and_offset(_uncast(scale))
                return x, weight, eps, offset
    return None


def _factors(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the operands of an elementwise product, in both orders."""
    if isinstance(node, Node) and node.target is aten.mul.Tensor:
        first, second = node.args
        yield first, second
        yield second, first


def _inverse_root(node: Any) -> tuple[Any, Any]:
    """Return x and ε of ``(mean(x²) + ε) ** -½``; None and None if `node` is anything else."""
    is_root = isinstance(node, Node) and (
        node.target is aten.rsqrt.default or (node.target is aten.pow.Tensor_Scalar and node.args[1] == -0.5)
    )
    total = source(node.args[0]) if is_root else None
    if not (isinstance(total, Node) and total.target is aten.add.Tensor and not total.kwargs):
        return None, None
    mean, eps = source(total.args[0]), total.args[1]
    if not (isinstance(mean, Node) and mean.target is aten.mean.dim and len(mean.args) == 3 and mean.args[2] is True):
        return None, None
    squares = source(mean.args[0])
    if mean.args[1] not in ([-1], [mean.meta["val"].dim() - 1]) or not isinstance(squares, Node):
        return None, None
    if squares.target is aten.pow.Tensor_Scalar and squares.args[1] == 2:
        return squares.args[0], eps
    if squares.target is aten.square.default:
        return squares.args[0], eps
    return None, None


def _weight_and_offset(scale: Any) -> tuple[Any, float]:
    if isinstance(scale, Node) and scale.target is aten.add.Tensor and not scale.kwargs:
        weight, offset = scale.args
        if isinstance(offset, (int, float)):
            return _uncast(weight), float(offset)
    return scale, 0.0


def _uncast(node: Any) -> Any:
    """Return the operand of `node` if it is a cast, else the source of `node`."""
    cast = cast_of(node)
    return source(node) if cast is None else cast


def _of_type(node: Any, dtype: torch.dtype) -> Node | None:
    """Return whichever of `node` and the operand of a cast has the given dtype; None if neither has."""
    candidates = (source(node), cast_of(node))
    return next((n for n in candidates if isinstance(n, Node) and dtype_of(n) == dtype), None)


def _between(node: Node, ends: set[Node]) -> set[Node]:
    found, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node not in found and node not in ends:
            found.add(node)
            waiting += node.all_input_nodes
    return found
