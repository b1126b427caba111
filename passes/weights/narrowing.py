"""Narrowing of a traced graph: adapt all sizes in the graph to linear layers with fewer outputs.

The number of heads occurs in a graph not only in the shapes of weights, but also as a number in views, expands and
slices. :class:`Narrowing` starts at the linear layers whose outputs are cut and propagates the cut dimensions through
every operator downstream, up to the linear layers whose inputs are cut. Each operator on the way needs a rule, which
maps the cut dimensions of its operands to those of its result and to new arguments. If an operator has no rule, or if a
cut value leaves the graph or is combined with an uncut one, narrowing is refused before anything is changed. The graph
stage of `structured_pruning` uses this module.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effpass.core.inline import program_values
from effpass.core.program import Program
from effpass.passes.weights.keep_indices import Axis, Cut, Segment

__all__ = ["Narrowing", "NotNarrowableError"]

aten = torch.ops.aten

#: Cut dimensions of one tensor: dimension → its segments.
Axes = dict[int, Axis]


class NotNarrowableError(Exception):
    """Raised when the graph uses a cut dimension in a way for which no rule is known."""


class Narrowing:
    """Edits that adapt `program` to cut weights.

    The constructor analyses the program, and :meth:`apply` edits it.

    Args:
        program: program to narrow.
        cuts: node of a linear layer → cut of its weight.

    Raises:
        NotNarrowableError: the program can't be narrowed; the message holds the node and the reason.
    """

    def __init__(self, program: Program, cuts: Mapping[Node, Cut]) -> None:
        self.program = program
        self.axes: dict[Node, Any] = {}  # tensor → Axes; a tuple of tensors → list of Axes
        self.edits: dict[Node, tuple[Any, ...]] = {}
        for node in program.graph.nodes:
            if node in cuts:
                self._product(node, cuts[node])
            elif any(self.axes.get(n) for n in node.all_input_nodes):
                self._follow(node)

    def apply(self) -> None:
        """Write the new sizes into the program, and recompute the fake values of all affected nodes."""
        for node, args in self.edits.items():
            node.args = args
        with program_values(self.program):
            for node in self.program.graph.nodes:
                if node in self.axes:
                    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                    node.meta["val"] = node.target(*args, **kwargs)

    def _product(self, node: Node, cut: Cut) -> None:
        """Check the input of a linear layer whose weight is cut, and record the cut dimensions of its output."""
        x = node.args[1] if node.target is aten.addmm.default else node.args[0]
        given = self._of(x).get(_dims(x) - 1)
        if cut.out:
            if self._of(x):
                raise NotNarrowableError(f"{node.format_node()} takes in a value that is cut already")
            self.axes[node] = {_dims(node) - 1: cut.axis}
        elif given != cut.axis or len(self._of(x)) != 1:
            raise NotNarrowableError(f"{node.format_node()} takes in a value that is not cut as its weight is")
        else:
            self.axes[node] = {}

    def _follow(self, node: Node) -> None:
        """Propagate cut dimensions through `node` with the rule of its operator."""
        if node.op == "output":
            cut = next(n for n in node.all_input_nodes if self.axes.get(n))
            raise NotNarrowableError(
                f"{cut.name} leaves the graph, as a key-value cache does, and what receives it expects all heads"
            )
        if node.target is aten.linear.default or node.target is aten.addmm.default:
            raise NotNarrowableError(f"{node.format_node()} takes in a cut value, and its weight is not cut")
        rule = _RULES.get(node.target)
        if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            rule = _pointwise
        if rule is None:
            raise NotNarrowableError(f"{node.format_node()} is no operation whose narrowing is known")
        found, args = rule(self, node)
        self.axes[node] = found
        if args is not None:
            self.edits[node] = args

    def _of(self, node: Any) -> Axes:
        return self.axes.get(node) or {} if isinstance(node, Node) else {}


# -- rules ----------------------------------------------------------------------------------------------------------
# rule(narrowing, node) → (axes of the result, new arguments of the node, or None to leave them unchanged)

Outcome = tuple[Any, tuple[Any, ...] | None]


def _args(node: Node) -> tuple[Any, ...]:
    return node.args


def _dims(node: Any) -> int:
    return node.meta["val"].dim()


def _size(node: Node, dim: int) -> Any:
    return node.meta["val"].shape[dim]


def _same(state: Narrowing, node: Node) -> Outcome:
    """Operators whose result has the dimensions of the first argument."""
    return dict(state._of(node.args[0])), None


def _pointwise(state: Narrowing, node: Node) -> Outcome:
    """Broadcasting from the last dimension; an uncut operand must have size 1 in a cut dimension."""
    found: Axes = {}
    dims = _dims(node)
    operands = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)]
    for operand in operands:
        for dim, axis in state._of(operand).items():
            at = dim + dims - _dims(operand)
            if found.setdefault(at, axis) != axis:
                raise NotNarrowableError(f"{node.format_node()} combines values that are cut differently")
    for operand in operands:
        for at in found:
            dim = at - dims + _dims(operand)
            if dim >= 0 and dim not in state._of(operand) and not statically_known_true(_size(operand, dim) == 1):
                raise NotNarrowableError(f"{node.format_node()} combines a cut value with the uncut {operand.name}")
    return found, None


def _transpose(state: Narrowing, node: Node) -> Outcome:
    x, *rest = _args(node)
    dims = _dims(x)
    if node.target is aten.permute.default:
        order = [d % dims for d in rest[0]]
    else:
        a, b = (d % dims for d in rest) if rest else (0, dims - 1)
        order = list(range(dims))
        order[a], order[b] = order[b], order[a]
    return {order.index(dim): axis for dim, axis in state._of(x).items()}, None


def _unsqueeze(state: Narrowing, node: Node) -> Outcome:
    x, dim = _args(node)
    dim = dim % (_dims(x) + 1)
    return {d + (d >= dim): axis for d, axis in state._of(x).items()}, None


def _expand(state: Narrowing, node: Node) -> Outcome:
    x, sizes, *rest = _args(node)
    shift = len(sizes) - _dims(x)
    found = {d + shift: axis for d, axis in state._of(x).items()}
    return found, (x, _resized(sizes, found), *rest)


def _reshape(state: Narrowing, node: Node) -> Outcome:
    """Unchanged dimensions are matched from both ends; the group of dimensions between them is split or merged."""
    x, sizes = _args(node)
    old, new = list(x.meta["val"].shape), list(node.meta["val"].shape)
    axes = state._of(x)
    left = 0
    while left < min(len(old), len(new)) and statically_known_true(old[left] == new[left]):
        left += 1
    right = 0
    while right < min(len(old), len(new)) - left and statically_known_true(old[-1 - right] == new[-1 - right]):
        right += 1
    found: Axes = {}
    for dim, axis in axes.items():
        if dim < left:
            found[dim] = axis
        elif dim >= len(old) - right:
            found[dim + len(new) - len(old)] = axis
        else:
            inner_old, inner_new = old[dim + 1 : len(old) - right], new[left + 1 : len(new) - right]
            if dim != left or left >= len(new) - right:
                raise NotNarrowableError(f"{node.format_node()} merges the cut dimension with those before it")
            found[left] = _rescaled(axis, inner_old, inner_new, node)
    return found, (x, _resized(sizes, found))


def _rescaled(axis: Axis, inner_old: list[Any], inner_new: list[Any], node: Node) -> Axis:
    """Return the axis of a group's first dimension when its inner dimensions change from `inner_old` to `inner_new`."""
    if len(axis) == 1 and all(isinstance(s, int) for s in (*inner_old, *inner_new)):
        (segment,) = axis
        inner, rest = divmod(segment.inner * math.prod(inner_old), math.prod(inner_new))
        splits = len(inner_new) > len(inner_old)
        if splits and segment.head not in (1, inner_new[-1]):
            raise NotNarrowableError(f"{node.format_node()} makes heads of {inner_new[-1]}, expected {segment.head}")
        if rest == 0 and inner:
            head = 1 if splits else segment.head
            return (Segment(segment.old, segment.new, inner, segment.units, head),)
    raise NotNarrowableError(f"{node.format_node()} splits a cut dimension within its units")


def _resized(sizes: Any, found: Axes) -> list[Any]:
    return [_new_size(found[d]) if d in found and s != -1 else s for d, s in enumerate(sizes)]


def _new_size(axis: Axis) -> int:
    return sum(s.new * s.inner for s in axis)


def _slice(state: Narrowing, node: Node) -> Outcome:
    given = [*_args(node), *(None, 0, None, None, 1)[len(node.args) :]]
    x, dim, start, end, step = given
    dim = dim % _dims(x)
    found = dict(state._of(x))
    if dim not in found:
        return found, None
    axis = found[dim]
    total = sum(s.old * s.inner for s in axis)
    start, end = start or 0, total if end is None or (isinstance(end, int) and end >= total) else end
    at = {0: (0, 0)}  # old boundary → (number of segments before it, new boundary)
    old = new = 0
    for i, segment in enumerate(axis, 1):
        old, new = old + segment.old * segment.inner, new + segment.new * segment.inner
        at[old] = (i, new)
    if not all(isinstance(v, int) and v in at for v in (start, end)) or step != 1:
        raise NotNarrowableError(f"{node.format_node()} cuts through the units of a cut dimension")
    (first, new_start), (last, new_end) = at[start], at[end]
    found[dim] = axis[first:last]
    return found, (x, dim, new_start, new_end)


def _chunk(state: Narrowing, node: Node) -> Outcome:
    x, _, *rest = _args(node)
    dim = (rest[0] if rest else 0) % _dims(x)
    axes = state._of(x)
    count = len(node.meta["val"])
    if dim not in axes:
        return [dict(axes)] * count, None
    axis = axes[dim]
    if len(axis) != count or len(set(axis)) != 1:
        raise NotNarrowableError(f"{node.format_node()} does not divide a cut dimension at its segments")
    pieces = [{**axes, dim: (segment,)} for segment in axis]
    if node.target is aten.chunk.default:
        return pieces, None
    size = _new_size(axis[:1])
    sizes: Any = size if node.target is aten.split.Tensor else [size] * count
    return pieces, (x, sizes, dim)


def _getitem(state: Narrowing, node: Node) -> Outcome:
    source, position = _args(node)
    return dict(state.axes[source][position]), None


def _cat(state: Narrowing, node: Node) -> Outcome:
    tensors, *rest = _args(node)
    first = tensors[0]
    dim = (rest[0] if rest else 0) % _dims(first)
    found = state._of(first)
    if dim in found or any(state._of(t) != found for t in tensors):
        raise NotNarrowableError(f"{node.format_node()} joins cut values with others, as a key-value cache does")
    return dict(found), None


def _reduce(state: Narrowing, node: Node) -> Outcome:
    x, over = _args(node)[:2]
    dims = _dims(x)
    reduced = {d % dims for d in (over if isinstance(over, list | tuple) else [over])}
    axes = state._of(x)
    if not reduced or reduced & axes.keys():
        raise NotNarrowableError(f"{node.format_node()} reduces over a cut dimension")
    if dims == _dims(node):
        return dict(axes), None
    return {d - sum(r < d for r in reduced): axis for d, axis in axes.items()}, None


def _softmax(state: Narrowing, node: Node) -> Outcome:
    x, dim = _args(node)[:2]
    if dim % _dims(x) in state._of(x):
        raise NotNarrowableError(f"{node.format_node()} normalizes over a cut dimension")
    return dict(state._of(x)), None


def _matmul(state: Narrowing, node: Node) -> Outcome:
    """Batch dimensions (heads) must be cut equally in both operands, and the last two dimensions must not be cut."""
    dims = _dims(node)
    found: Axes = {}
    for operand in _args(node):
        for dim, axis in state._of(operand).items():
            at = dim + dims - _dims(operand)
            if dim >= _dims(operand) - 2 or found.setdefault(at, axis) != axis:
                raise NotNarrowableError(f"{node.format_node()} multiplies over a cut dimension")
    for operand in _args(node):
        for at in found:
            dim = at - dims + _dims(operand)
            if dim >= 0 and dim not in state._of(operand) and not statically_known_true(_size(operand, dim) == 1):
                raise NotNarrowableError(f"{node.format_node()} multiplies a cut value with an uncut one")
    return found, None


def _attention(state: Narrowing, node: Node) -> Outcome:
    """Query heads `[..., H, T, K]` and KV heads `[..., G, S, K]` must be cut by the same set of KV groups."""
    q, k, v, *rest = _args(node)
    mask = rest[0] if rest else node.kwargs.get("attn_mask")
    head = _dims(q) - 3
    axes = [state._of(n) for n in (q, k, v)]
    if any(set(a) != {head} or len(a[head]) != 1 for a in axes) or len({a[head][0].units for a in axes}) != 1:
        raise NotNarrowableError(f"{node.format_node()} reads queries, keys and values that are not cut alike")
    if isinstance(mask, Node) and (
        state._of(mask) or (_dims(mask) > 2 and not statically_known_true(_size(mask, -3) == 1))
    ):
        raise NotNarrowableError(f"{node.format_node()} has a mask per head")
    return dict(axes[0]), None


_RULES: dict[Any, Callable[[Narrowing, Node], Outcome]] = {
    **dict.fromkeys(
        (
            aten.to.dtype,
            aten.to.dtype_layout,
            aten.type_as.default,
            aten._to_copy.default,
            aten.contiguous.default,
            aten.clone.default,
            aten.alias.default,
            aten.detach.default,
            aten.dropout.default,
        ),
        _same,
    ),
    **dict.fromkeys((aten.transpose.int, aten.permute.default, aten.t.default), _transpose),
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default), _reshape),
    **dict.fromkeys((aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default), _chunk),
    **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList), _reduce),
    **dict.fromkeys((aten.softmax.int, aten._softmax.default), _softmax),
    **dict.fromkeys((aten.matmul.default, aten.bmm.default), _matmul),
    aten.unsqueeze.default: _unsqueeze,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.cat.default: _cat,
    aten.scaled_dot_product_attention.default: _attention,
    operator.getitem: _getitem,
}
