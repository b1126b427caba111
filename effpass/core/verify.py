"""Checks on the *result* of a pass: the graph is well formed, its interface is unchanged, no read moved across a write.

The manager takes a :func:`snapshot` of a program before a pass and calls :func:`verify` after it. Programs are not
functional: caches are written in place, so the order of the reads and writes of a storage is part of a program's
meaning. The order is represented by *epochs*: the epoch of a read is the number of writes to the same storage that
precede it. A pass may move a read as long as its epoch stays the same.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effpass.core.errors import RewriteError

if TYPE_CHECKING:
    from effpass.core.program import Program

__all__ = ["Snapshot", "aliased_operands", "returns_alias", "snapshot", "verify"]

# Operators whose schema declares that they return an alias, although they may copy their operand instead.
_SOMETIMES_COPIES = {
    "contiguous",
    "flatten",
    "ravel",
    "reshape",
    "reshape_as",
    "resolve_conj",
    "resolve_neg",
    "to",
    "type_as",
}


@dataclass(frozen=True)
class Snapshot:
    """Properties of a program that must still hold after a pass.

    Only storages that the program writes to occur in `epochs` and `writes`. A storage is identified by its *root*, the
    node at the start of a chain of views.

    Attributes:
        nodes: all nodes of the graph.
        inputs: names of the placeholders, in order.
        outputs: `(shape, dtype)` of each output, as traced.
        storages: root of the storage of each output; None for an output that is not a node.
        epochs: reader → {root: number of writes to the storage before this read}.
        writes: root → nodes that write to the storage, in order.
    """

    nodes: frozenset[Node]
    inputs: tuple[str, ...]
    outputs: tuple[Any, ...]
    storages: tuple[Any, ...]
    epochs: dict[Node, dict[Node, int]]
    writes: dict[Node, list[Node]]


def snapshot(program: Program) -> Snapshot:
    """Record the properties that :func:`verify` compares with; called before a pass."""
    nodes = frozenset(program.graph.nodes)
    inputs = tuple(n.name for n in program.graph.find_nodes(op="placeholder"))
    epochs, writes, root = _accesses(program.graph)
    return Snapshot(nodes, inputs, _outputs(program.graph), _storages(program.graph, root), epochs, writes)


def verify(program: Program, before: Snapshot, name: str) -> None:
    """Check the result of a pass.

    Args:
        program: the program after the pass.
        before: the :func:`snapshot` taken before the pass.
        name: name of the pass, for messages.

    Raises:
        RewriteError: the graph is malformed, its inputs or outputs changed, a new node has no value, a write reaches
            another storage than before, an output newly shares the storage of an input, or the reads and writes of a
            storage changed their order. A write that the pass declared with
            :meth:`~effpass.core.program.Program.replace_write` counts as the one that it replaces.
    """
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise RewriteError(f"pass {name} left a malformed graph: {error}") from error
    _verify_interface(program, before, name)
    for node in program.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta and _yields_tensor(node):
            raise RewriteError(
                f"pass {name}: new node {node.format_node()} has no value in meta['val']",
                hint="set it to what the operator gives for the meta['val'] of the arguments: node.target(*values)",
            )
    _verify_order(program, before, name)


def _verify_interface(program: Program, before: Snapshot, name: str) -> None:
    inputs = [n.name for n in program.graph.find_nodes(op="placeholder")]
    if program.front == "dynamo" and inputs[: len(before.inputs)] != list(before.inputs):
        missing = [i for i in before.inputs if i not in inputs]
        raise RewriteError(
            f"pass {name} removed inputs of the graph: {missing}"
            if missing
            else f"pass {name} reordered the inputs of the graph: {list(before.inputs)} became {inputs}"
        )
    outputs = _outputs(program.graph)
    if len(outputs) != len(before.outputs):
        raise RewriteError(f"pass {name} changed the number of outputs from {len(before.outputs)} to {len(outputs)}")
    for position, (old, new) in enumerate(zip(before.outputs, outputs, strict=True)):
        if not _same(old, new):
            raise RewriteError(f"pass {name} changed output {position} from {old} to {new}")


def _verify_order(program: Program, before: Snapshot, name: str) -> None:
    reads, writes, storage = _accesses(program.graph)
    for position, (was, now) in enumerate(zip(before.storages, _storages(program.graph, storage), strict=True)):
        if isinstance(now, Node) and now.op == "placeholder" and now is not was:
            raise RewriteError(
                f"pass {name} made output {position} share the storage of the input {now.name}, so that a write to one"
                " is a write to both",
                hint="give a copy: aten.clone",
            )
    alive = set(program.graph.nodes)
    stands_for = {new: old for new, (old, _) in program.replaced_writes.items() if new not in before.nodes}
    for root, old in before.writes.items():
        kept = [stands_for.get(w, w) for w in writes.get(root, ()) if w in before.nodes or w in stands_for]
        in_use = root in alive and (root.op == "placeholder" or root.users)
        if in_use and kept != old:  # an unread intermediate may go, with its writes
            raise RewriteError(
                f"pass {name} removed or reordered writes to {root.name}: {_names(old)} became {_names(kept)}"
            )
    for root, new in writes.items():
        old = before.writes.get(root, [])
        moved = [w for w in new if w in before.nodes and w not in old]
        if moved and root in before.nodes:
            raise RewriteError(
                f"pass {name} made {moved[0].name} write to {root.name}, where it wrote to a value of its own",
                hint="a value that is written in place can't be replaced by the one that it was a copy of",
            )
        added = [w for w in new if w not in before.nodes and stands_for.get(w) not in old]
        if added and root in before.nodes:
            raise RewriteError(f"pass {name} added writes to {root.name}: {_names(added)}")
        for epoch, write in enumerate(new, start=1):
            for reader in program.replaced_writes[write][1] if write in stands_for else ():
                _verify_read(before, root, reader, epoch, name, f", where {write.name} does it")
    seen: dict[Node, set[int]] = defaultdict(set)
    for epochs in before.epochs.values():
        for root, epoch in epochs.items():
            seen[root].add(epoch)
    for reader, epochs in reads.items():
        for root, epoch in epochs.items():
            _verify_read(before, root, reader, epoch, name)
            if reader not in before.nodes and root in before.writes and epoch not in seen[root]:
                raise RewriteError(
                    f"pass {name} reads {root.name} across a write: new node {reader.name} comes after {epoch} of its"
                    f" writes, and the program read it only after {sorted(seen[root])}"
                )


def _verify_read(before: Snapshot, root: Node, reader: Node, epoch: int, name: str, where: str = "") -> None:
    was = before.epochs.get(reader, {}).get(root, epoch)
    if was != epoch:
        raise RewriteError(
            f"pass {name} moved the read of {root.name} by {reader.name} across a write: it came after {was} of the"
            f" writes and now comes after {epoch}{where}"
        )


def _accesses(
    graph: torch.fx.Graph,
) -> tuple[dict[Node, dict[Node, int]], dict[Node, list[Node]], dict[Node, Node]]:
    """`epochs` and `writes` as in :class:`Snapshot`, and the root of every node."""
    root: dict[Node, Node] = {}
    writes: dict[Node, list[Node]] = defaultdict(list)
    reads: list[tuple[Node, Node, int]] = []
    for node in graph.nodes:
        aliased = dict(aliased_operands(node))
        is_view = bool(aliased) and returns_alias(node)
        for operand in node.all_input_nodes:
            if not aliased.get(operand) and not (is_view and operand in aliased and not _may_copy(node)):
                reads.append((node, root[operand], len(writes[root[operand]])))
        root[node] = root[next(iter(aliased))] if is_view else node
        for operand, written in aliased.items():
            if written:
                writes[root[operand]].append(node)
    epochs: dict[Node, dict[Node, int]] = defaultdict(dict)
    for node, storage, epoch in reads:
        if writes[storage]:
            epochs[node][storage] = epoch
    return dict(epochs), {storage: nodes for storage, nodes in writes.items() if nodes}, root


def aliased_operands(node: Node) -> Iterator[tuple[Node, bool]]:
    """Yield the operands whose storage `node` writes or may return, each with whether it is written."""
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        yield node.args[0], False
    if node.target is triton_kernel_wrapper_mutation:  # a user's kernel does not declare which operands it writes
        yield from ((operand, True) for operand in node.all_input_nodes)
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is None:
            continue
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        for value in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(value, Node):
                yield value, argument.alias_info.is_write


def returns_alias(node: Node) -> bool:
    """Whether the value of `node` may share storage with an operand."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    return any(r.alias_info is not None for r in node.target._schema.returns)


def _may_copy(node: Node) -> bool:
    """Whether `node` may copy although its schema declares an alias; a copy reads its operand at that point."""
    return getattr(node.target, "_opname", None) in _SOMETIMES_COPIES


def _yields_tensor(node: Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(
        r.type.isSubtypeOf(torch._C.TensorType.get()) for r in target._schema.returns
    )


def _outputs(graph: torch.fx.Graph) -> tuple[Any, ...]:
    return tuple(_described(value) for value in _flat_outputs(graph))


def _storages(graph: torch.fx.Graph, root: dict[Node, Node]) -> tuple[Any, ...]:
    return tuple(root.get(value) if isinstance(value, Node) else None for value in _flat_outputs(graph))


def _flat_outputs(graph: torch.fx.Graph) -> list[Any]:
    (output,) = graph.find_nodes(op="output")
    return torch.utils._pytree.tree_leaves(output.args[0])


def _described(output: Any) -> Any:
    if not isinstance(output, Node):
        return output
    value = output.meta.get("val")
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def _same(old: Any, new: Any) -> bool:
    """Whether two outputs have the same shape and dtype, as far as that is known without a guard on a symbolic size."""
    if not (isinstance(old, tuple) and isinstance(new, tuple)):
        return bool(old == new)
    sizes = zip(old[0], new[0], strict=False)
    return old[1] == new[1] and len(old[0]) == len(new[0]) and all(statically_known_true(a == b) for a, b in sizes)


def _names(nodes: list[Node]) -> list[str]:
    return [n.name for n in nodes]
