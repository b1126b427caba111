"""Cost model of operators: the FLOPs and bytes of every node of a program, as expressions of the program's symbols.

    flops(node)    2 per multiply-add of matrix products, attention and convolutions; 0 for other operators, whose cost
                   is the bytes they move
    reads(node)    bytes it must read of each value; a broadcast dimension counts once, and of a table that is gathered
                   from, only the selected entries count
    written(node)  bytes it writes; a view writes nothing

Static sizes give ints. A dynamic dimension gives a sympy expression of its symbol (batch, tokens, cache length), which
:func:`effpass.core.flops.evaluate` turns into a number for any size. The manager uses :func:`total` to report what a
pass changed; :mod:`effpass.core.kernels` groups the nodes into kernels, whose time :mod:`effpass.core.roofline`
predicts.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.fx import Node

from effpass.core.flops import (
    Reading,
    Size,
    flop_formula,
    hinted,
    is_grouped_product,
    numel,
    packet_of,
    smaller,
    symbolic,
    values_of,
)

if TYPE_CHECKING:
    from effpass.core.program import Program

__all__ = ["Cost", "NodeCost", "node_costs", "total", "uncounted", "weight_nodes"]

aten = torch.ops.aten

Kind = Literal["free", "matmul", "attention", "fusible", "other"]


@dataclass(frozen=True)
class NodeCost:
    """Cost of one operator.

    Attributes:
        node: node of the graph.
        kind: ``"matmul"``, ``"attention"`` or ``"other"`` for an operator that is a kernel of its own, ``"fusible"``
            for pointwise operators, reductions and copies, ``"free"`` for views and calls of bodies.
        flops: number of floating-point operations.
        reads: bytes read, by the node that owns the memory.
        written: bytes written.
        base: node that owns the memory of this node's value: `node` itself, unless it is a view or works in place.
    """

    node: Node
    kind: Kind
    flops: Size
    reads: dict[Node, Size]
    written: Size
    base: Node


@dataclass(frozen=True)
class Cost:
    """Totals over a program and its bodies.

    Attributes:
        flops: number of floating-point operations; a multiply-add counts as two.
        weight_bytes: bytes of weights and derived weights that one call reads.
    """

    flops: Size
    weight_bytes: Size


def total(program: Program, size: Reading = hinted) -> Cost:
    """FLOPs and weight bytes of `program` and its bodies, at the traced sizes unless `size` is :func:`symbolic`.

    The result equals the sums over :func:`node_costs` but takes a fraction of the time, which matters because the
    manager calls this during compilation.
    """
    flops: Size = 0
    weight_bytes: Size = 0
    for part in (program, *program.bodies):
        for node in part.graph.nodes:
            formula = flop_formula(node) if node.op == "call_function" else None
            flops += 0 if formula is None else formula(node, size)
        callers = {body.caller for body in part.bodies}
        for weight in weight_nodes(part):
            weight_bytes += sum(_bytes_read(u, seen, size) for u, seen in _readers(weight) if u not in callers)
    return Cost(flops, weight_bytes)


def _readers(memory: Node) -> Iterator[tuple[Node, Node]]:
    """Yield each reader of `memory` or of a view of it, together with the node that it reads."""
    waiting = [memory]
    while waiting:
        seen = waiting.pop()
        for user in seen.users:
            if _memory_of(user) is seen and not _is_mutable(user.target):
                waiting.append(user)
            elif user.op != "output" and values_of(user):
                yield user, seen


def weight_nodes(program: Program) -> set[Node]:
    """The placeholders of weights and of derived weights."""
    placeholders = program.graph.find_nodes(op="placeholder")
    appended = placeholders[len(placeholders) - len(program.derived) :]
    return {*program.weights, *appended}


def uncounted(program: Program) -> set[str]:
    """Operators from outside PyTorch that have no FLOP formula, so that only their bytes are counted."""
    found = set()
    for part in (program, *program.bodies):
        called = {body.caller for body in part.bodies}
        for node in part.graph.nodes:
            foreign = isinstance(node.target, torch._ops.HigherOrderOperator) or (
                isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims")
            )
            if foreign and node not in called and values_of(node) and flop_formula(node) is None:
                found.add(str(node.target))
    return found


# -- one program ------------------------------------------------------------------------------------------------------


def node_costs(program: Program, size: Reading = symbolic) -> Iterator[NodeCost]:
    """Yield the cost of every node that computes tensors, in graph order. The bodies of `program` are not included."""
    bases: dict[Node, Node] = {}
    callers = {body.caller for body in program.bodies}
    for node in program.graph.nodes:
        if node.op not in ("call_function", "call_method", "call_module"):
            bases[node] = node
            continue
        source = _memory_of(node)
        bases[node] = node if source is None else bases[source]
        cost = _cost(node, bases, size, node in callers)
        if cost is not None:
            yield cost


def _cost(node: Node, bases: Mapping[Node, Node], size: Reading, is_caller: bool) -> NodeCost | None:
    outputs = values_of(node)
    mutates = _is_mutable(node.target)
    if is_caller or not outputs or (bases[node] is not node and not mutates):
        return NodeCost(node, "free", 0, {}, 0, bases[node]) if outputs else None
    reads: dict[Node, Size] = {}
    for argument in _tensor_arguments(node):
        read = _bytes_read(node, argument, size)
        if read != 0:
            base = bases[argument]
            whole = sum(_bytes(v, size) for v in values_of(base))
            reads[base] = read if base not in reads else smaller(reads[base] + read, whole)
    written = _bytes_written(node, outputs, size)
    formula = flop_formula(node)
    return NodeCost(
        node, _kind(node, formula), 0 if formula is None else formula(node, size), reads, written, bases[node]
    )


def _tensor_arguments(node: Node) -> Iterable[Node]:
    return (n for n in node.all_input_nodes if values_of(n))


def _bytes(value: torch.Tensor, size: Reading) -> Size:
    """Bytes of the distinct elements of `value`; a dimension of stride 0 repeats the same elements."""
    strides = value.stride() if value.layout is torch.strided else value.shape
    distinct = (size(d) for d, stride in zip(value.shape, strides, strict=True) if not _is(stride, 0))
    return functools.reduce(operator.mul, distinct, 1) * value.element_size()


def _is(number: Any, constant: int) -> bool:
    """Whether `number` equals `constant` for all sizes."""
    return isinstance(number, int) and number == constant


# -- memory -----------------------------------------------------------------------------------------------------------

# Operators that read only those elements of their first argument that they return.
_GATHERS = (aten.embedding, aten.index, aten.gather, aten.index_select, aten.take, aten.take_along_dim)
# Operators that write only a part of their first argument → the argument that has the shape of the written part.
_SCATTERS = {
    aten.index_copy_: "source", aten.index_put_: "values", aten.index_add_: "source", aten.scatter_: "index",
    aten.scatter_add_: "index",
}  # fmt: skip
# Operators that overwrite their first argument without reading it.
_OVERWRITES = (aten.copy_, aten.fill_, aten.zero_)
_EMPTY = (aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.empty_permuted)


def _is_mutable(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _memory_of(node: Node) -> Node | None:
    """The argument whose memory the value of `node` shares; None when `node` allocates new memory."""
    first = next((a for a in node.args if isinstance(a, Node)), None)
    if first is None:
        return None
    if node.target is operator.getitem:
        return first
    if not isinstance(node.target, torch._ops.OpOverload) or not values_of(node) or not values_of(first):
        return None
    schema = node.target._schema
    aliases = [r.alias_info for r in schema.returns if r.alias_info is not None]
    # The schemas of chunk and split declare aliases for the elements of the returned list only.
    if not aliases and packet_of(node.target) not in _LISTS_OF_VIEWS:
        return _source_of_identity(node, first)
    if any(alias.is_write for alias in aliases):
        return first
    new, old = values_of(node)[0], values_of(first)[0]
    if (new.dtype != old.dtype and packet_of(node.target) is not aten.view) or new.device != old.device:
        return None
    if packet_of(node.target) in (aten.reshape, aten.flatten, aten.contiguous) and not _is_view(old, new):
        return None
    return first


_LISTS_OF_VIEWS = (aten.chunk, aten.split, aten.split_with_sizes, aten.unbind, aten.tensor_split)


def _source_of_identity(node: Node, first: Node) -> Node | None:
    """The operand of a dropout outside training, which returns it unchanged; None for other nodes."""
    return first if packet_of(node.target) is aten.dropout and node.args[2:] == (False,) else None


def _is_view(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether `old` can be viewed with the shape of `new` without a copy, at the traced sizes."""
    shape, strides = [hinted(d) for d in old.shape], [hinted(s) for s in old.stride()]
    stand_in = torch.empty_strided(shape, strides, device="meta")
    if shape == [hinted(d) for d in new.shape]:
        return strides == [hinted(s) for s in new.stride()]
    try:
        stand_in.view([hinted(d) for d in new.shape])
    except RuntimeError:
        return False
    return True


def _bytes_read(node: Node, argument: Node, size: Reading) -> Size:
    packet, is_first = packet_of(node.target), argument is next(iter(_tensor_arguments(node)), None)
    values = values_of(argument)
    if packet in _GATHERS and is_first:
        return sum(numel(v, size) for v in values_of(node)) * values[0].element_size()
    if (is_first and (packet in _SCATTERS or packet in _OVERWRITES)) or packet in _EMPTY:
        return 0
    if is_grouped_product(packet) and argument is node.args[1]:
        return _experts_read(values_of(node.args[0])[0].shape[:-1], values[0], size)  # type: ignore[arg-type]
    if str(packet) == "effpass.moe_ffn" and argument in (node.args[3], node.args[5]):
        return _experts_read(values_of(node.args[1])[0].shape, values[0], size)  # type: ignore[arg-type]
    return sum(_bytes(v, size) for v in values)


def _experts_read(rows: Sequence[Any], experts: torch.Tensor, size: Reading) -> Size:
    """Bytes read of `experts` `[E, ...]` by a grouped product over as many tokens as the product of the sizes `rows`.

    Only experts that have a token are read, which are at most as many as there are tokens.
    """
    whole = _bytes(experts, size)
    if experts.dim() != 3 or not rows:
        return whole
    count = functools.reduce(operator.mul, (size(d) for d in rows), 1)
    return smaller(count, size(experts.shape[0])) * (whole // size(experts.shape[0]))


def _bytes_written(node: Node, outputs: list[torch.Tensor], size: Reading) -> Size:
    packet = packet_of(node.target)
    if packet in _EMPTY:
        return 0
    if packet in _SCATTERS:
        schema = node.target._schema  # type: ignore[union-attr]
        position = next((i for i, a in enumerate(schema.arguments) if a.name == _SCATTERS[packet]), None)
        source = node.args[position] if position is not None and position < len(node.args) else None
        if isinstance(source, Node):
            return numel(values_of(source)[0], size) * outputs[0].element_size()
    return sum(numel(v, size) * v.element_size() for v in outputs)


# -- kinds and formulas -----------------------------------------------------------------------------------------------

# ATen operators without a FLOP formula for which Inductor calls a library kernel instead of fusing them.
_LIBRARY = (
    aten.sort, aten.topk, aten.argsort, aten.nonzero, aten.multinomial, aten.bincount, aten.histc,
    aten.masked_select,
)  # fmt: skip


def _kind(node: Node, formula: Any) -> Kind:
    packet = packet_of(node.target)
    if formula is not None:
        return "attention" if "attention" in str(packet) else "matmul"
    if isinstance(node.target, torch._ops.HigherOrderOperator) or packet in _LIBRARY:
        return "other"
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims"):
        return "other"
    return "fusible"
