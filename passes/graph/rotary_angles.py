"""Recognize the angles of rotary position embedding (https://arxiv.org/abs/2104.09864).

    a[b, t, r] = p[b, t] · f[r]         p: positions, integers;  f: frequencies;  a: angles, float32

transformers writes this as a multiplication, ``p[..., None].float() * f.to(torch.float)``, and before 5.23 as a matrix
product of inner dimension 1, ``(f[None, :, None].expand(B, -1, 1) @ p[:, None, :].float()).transpose(1, 2)``, with the
cast of f at either side of the expansion.

Shapes: B batch, T tokens, R rotated features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effpass.passes.graph.same_value import cast_of, dtype_of, source

__all__ = ["Angles", "angles_at"]

aten = torch.ops.aten


class Angles(NamedTuple):
    """Matched angles.

    Attributes:
        positions: int32 or int64 `[B, T]`.
        frequencies: `[R / 2]`, of any floating-point dtype.
        inner: nodes that compute the angles from them.
    """

    positions: Node
    frequencies: Node
    inner: list[Node]


def angles_at(node: Any) -> Angles | None:
    """Return the positions and frequencies whose product is `node`, `[B, T, R / 2]`; None for anything else."""
    node = source(node)
    if not _is(node, aten.mul.Tensor):
        return _by_product(node)
    for positions, frequencies in (node.args, node.args[::-1]):
        if _has_dims(positions, 3) and _has_dims(frequencies, 1) and (found := _angles(node, positions, frequencies)):
            return found
    return None


def _by_product(node: Any) -> Angles | None:
    if not _is(node, aten.transpose.int) or {dim % 3 for dim in node.args[1:]} != {1, 2}:
        return None
    product = source(node.args[0])
    if not _is(product, aten.matmul.default):
        return None
    frequencies, positions = product.args
    if not _has_dims(positions, 3) or not _has_dims(frequencies, 2):
        return None
    if not _equal(positions.meta["val"].shape[1], 1):
        return None
    found = _angles(node, positions, frequencies, dim=1, feature=-2)
    return found and found._replace(inner=[*found.inner, product])


def _angles(node: Node, positions: Node, frequencies: Node, dim: int = 2, feature: int = -1) -> Angles | None:
    """Match the operands of `node`; positions are repeated along `dim`, frequencies along all others than `feature`."""
    feature %= frequencies.meta["val"].dim()
    p, of_p = _unrepeated(positions, [0, 1, 2][:dim] + [0, 1, 2][dim + 1 :])
    f, of_f = _unrepeated(frequencies, [feature])
    if p is None or f is None or dtype_of(p) not in (torch.int32, torch.int64) or not dtype_of(f).is_floating_point:
        return None
    shape = (*p.meta["val"].shape, *f.meta["val"].shape)
    same = node.meta["val"].dim() == 3 and all(map(_equal, node.meta["val"].shape, shape))
    return Angles(p, f, [node, *of_p, *of_f]) if same else None


def _unrepeated(node: Any, kept: list[int]) -> tuple[Any, list[Node]]:
    """Look through casts to float32 and through the repetition of a tensor along dimensions other than `kept`.

    Returns:
        The node of the tensor, which has the dimensions `kept` of `node`, and the nodes from it to `node`. The former
        is None if there is no such tensor.
    """
    dims, inner = list(range(node.meta["val"].dim())), []
    while isinstance(node := source(node), Node):
        before = node.args[0].meta["val"].shape if node.args and isinstance(node.args[0], Node) else ()
        if _is(node, aten.unsqueeze.default) and dims[node.args[1]] not in kept:  # type: ignore[index]
            del dims[node.args[1]]  # type: ignore[arg-type]
        elif _is(node, aten.expand.default):
            new = len(dims) - len(before)
            sizes = zip(dims[new:], before, node.meta["val"].shape[new:], strict=True)
            if any(dim in kept for dim in dims[:new]) or any(d in kept and not _equal(a, b) for d, a, b in sizes):
                break
            dims = dims[new:]
        elif not _is_whole_slice(node) and (cast_of(node) is None or dtype_of(node) != torch.float32):
            break
        inner.append(node)
        node = node.args[0]
    return (node, inner) if dims == kept else (None, inner)


def _is_whole_slice(node: Node) -> bool:
    """Whether `node` is ``x[:]`` along some dimension, as dynamic sizes leave it in the graph."""
    if not _is(node, aten.slice.Tensor) or len(node.args) > 4:  # the fifth is a step
        return False
    return all(map(_equal, node.all_input_nodes[0].meta["val"].shape, node.meta["val"].shape))


def _has_dims(node: Any, least: int) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and least <= value.dim() <= 3


def _equal(a: Any, b: Any) -> bool:
    return statically_known_true(a == b)


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.target is target
