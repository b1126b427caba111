"""Recognize rotary position embedding in its half-split form (https://arxiv.org/abs/2104.09864).

    rotated = x · cos + (−x₂, x₁) · sin

x₁ and x₂ are the two halves of the first R features of a head; the other features remain unchanged. This is the form
that `apply_rotary_pos_emb` of transformers is traced to, with all features of a head rotated or only the first ones
(Phi-3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from effpass.passes.graph.same_value import cast_of, dtype_of, source

__all__ = ["Rotation", "rotation_at"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Rotation:
    """One rotated value.

    Attributes:
        x: value before the rotation, `[B, H, T, K]`.
        cos: cosines, `[B, T, R]` or `[1, T, R]`, R ≤ K.
        sin: sines, of the same shape as `cos`.
        inner: nodes that compute the rotation, including the node of the rotated value.
    """

    x: Node
    cos: Node
    sin: Node
    inner: tuple[Node, ...]


def rotation_at(node: Any) -> Rotation | None:
    """Return the rotation that computes `node`, of the dtype of its input; None if `node` is anything else."""
    node = source(node)
    cast = cast_of(node)
    turned = node if cast is None else cast
    found = _turned(turned) or _with_rest(turned)
    if found is None or dtype_of(found.x) != dtype_of(node):
        return None
    return found if cast is None else Rotation(found.x, found.cos, found.sin, (*found.inner, node))


def _turned(node: Any) -> Rotation | None:
    """Match ``x * cos + turn(x) * sin`` over all features of x, where ``turn(x) = (−x₂, x₁)``."""
    if not _is(node, aten.add.Tensor) or node.kwargs:
        return None
    for plain, other in (node.args, node.args[::-1]):
        for x, cos in _factors(plain):
            for turn, sin in _factors(other):
                if (halves := _halves_of(turn)) is not None and halves is x:
                    cos, sin = _before_heads(cos), _before_heads(sin)
                    if cos is not None and sin is not None:
                        return Rotation(x, cos, sin, (turn, source(plain), source(other), node))
    return None


def _with_rest(node: Any) -> Rotation | None:
    """Match ``cat(turned, rest)``: the first features of x rotated, the rest unchanged."""
    parts = _concatenated(node)
    turned = _turned(cast_of(parts[0]) or source(parts[0])) if parts is not None else None
    if parts is None or turned is None:
        return None
    width = turned.x.meta["val"].shape[-1]
    whole, start, end = _slice(parts[1])
    if start != width or end != whole.meta["val"].shape[-1]:
        return None
    first, *bounds = _slice(turned.x)
    is_first = turned.x is whole or (first is whole and bounds == [0, width])
    return Rotation(whole, turned.cos, turned.sin, (*turned.inner, node)) if is_first else None


def _halves_of(node: Any) -> Any:
    """Return x of ``cat((-x[..., R/2:], x[..., :R/2]))``; None if `node` is anything else."""
    parts = _concatenated(node)
    if parts is None or not _is(source(parts[0]), aten.neg.default):
        return None
    x, second, end = _slice(source(parts[0]).args[0])
    y, first, middle = _slice(parts[1])
    if x is not y or not isinstance(x, Node):
        return None
    width = x.meta["val"].shape[-1]
    return x if (first, middle, second, end) == (0, width // 2, width // 2, width) and width % 2 == 0 else None


def _before_heads(node: Any) -> Any:
    """Return the cosines or sines `[B, T, R]` that `node` unsqueezes to `[B, 1, T, R]`; None for anything else."""
    node = source(node)
    if not _is(node, aten.unsqueeze.default) or node.args[1] != 1 or node.meta["val"].dim() != 4:
        return None
    return source(node.args[0])


def _slice(node: Any) -> tuple[Any, Any, Any]:
    """Return the value that `node` is a slice of along the last dimension, and the bounds of the slice."""
    node = source(node)
    if not _is(node, aten.slice.Tensor):
        return node, 0, node.meta["val"].shape[-1] if isinstance(node, Node) else None
    x, dim, start, end = (*node.args, 0, None, None)[:4] if len(node.args) < 4 else node.args[:4]
    last = node.meta["val"].dim() - 1
    if dim not in (-1, last) or len(node.args) > 4:
        return None, None, None
    width = x.meta["val"].shape[-1]
    return source(x), start or 0, width if end is None else min(end, width)


def _concatenated(node: Any) -> tuple[Any, Any] | None:
    """Return the two parts of a concatenation along the last dimension; None for anything else."""
    node = source(node)
    if not _is(node, aten.cat.default) or node.args[1:] not in ((-1,), (node.meta["val"].dim() - 1,)):
        return None
    parts = node.args[0]
    return tuple(parts) if len(parts) == 2 else None


def _factors(node: Any) -> Iterator[tuple[Any, Any]]:
    node = source(node)
    if _is(node, aten.mul.Tensor):
        first, second = (source(factor) for factor in node.args)
        yield first, second
        yield second, first


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.target is target
