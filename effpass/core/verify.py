"""Checks on the *result* of a pass: a valid graph, the same interface, no read moved across a write."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from effpass.core.errors import RewriteError

if TYPE_CHECKING:
    from effpass.core.program import Program

__all__ = ["Snapshot", "snapshot", "verify"]


@dataclass(frozen=True)
class Snapshot:
    """What must still hold after a pass.

    Attributes:
        inputs: names of the placeholders.
        outputs: per output, `(shape, dtype)` as traced.
        epochs: reader node → {storage root: number of writes to it before the read}.
        writes: storage root → names of the nodes that write to it, in order.
    """

    inputs: tuple[str, ...]
    outputs: tuple[Any, ...]
    epochs: dict[Node, dict[Node, int]]
    writes: dict[Node, tuple[str, ...]]


def snapshot(program: Program) -> Snapshot:
    epochs, writes = _access_order(program.graph)
    return Snapshot(
        tuple(n.name for n in program.graph.find_nodes(op="placeholder")), _outputs(program.graph), epochs, writes
    )


def verify(program: Program, before: Snapshot, name: str) -> None:
    """Raise :class:`RewriteError` when pass `name` left a program that is not valid.

    `before` is the snapshot taken ahead of the pass.
    """
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise RewriteError(f"pass {name} left a malformed graph: {error}") from error
    inputs = [n.name for n in program.graph.find_nodes(op="placeholder")]
    kept = [i for i in inputs if i in set(before.inputs)]
    if program.front == "dynamo" and kept != list(before.inputs):
        missing = [i for i in before.inputs if i not in inputs]
        raise RewriteError(f"pass {name} removed or reordered inputs of the graph: {missing or kept}")
    outputs = _outputs(program.graph)
    if len(outputs) != len(before.outputs):
        raise RewriteError(f"pass {name} changed the number of outputs from {len(before.outputs)} to {len(outputs)}")
    for position, (old, new) in enumerate(zip(before.outputs, outputs, strict=True)):
        if not _same(old, new):
            raise RewriteError(f"pass {name} changed output {position} from {old} to {new}")
    for node in program.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta and _yields_tensor(node):
            raise RewriteError(f"pass {name}: new node {node.format_node()} has no value in meta['val']")
    _verify_order(program, before, name)


def _verify_order(program: Program, before: Snapshot, name: str) -> None:
    epochs, writes = _access_order(program.graph)
    for root, old in before.writes.items():
        kept = [w for w in writes.get(root, ()) if w in set(old)]
        if kept != list(old):
            raise RewriteError(f"pass {name} removed or reordered writes to {root.name}: {list(old)} became {kept}")
    alive = set(program.graph.nodes)
    allowed: dict[Node, set[int]] = defaultdict(set)
    for reader, seen in before.epochs.items():
        for root, epoch in seen.items():
            allowed[root].add(epoch)
            if reader in alive and root in epochs.get(reader, {}) and epochs[reader][root] != epoch:
                raise RewriteError(
                    f"pass {name} moved the read of {root.name} by {reader.name} across a write: it came after {epoch}"
                    f" writes and now comes after {epochs[reader][root]}"
                )
    for reader, seen in epochs.items():
        for root, epoch in seen.items():
            if reader not in before.epochs and root in before.writes and epoch not in allowed[root]:
                raise RewriteError(
                    f"pass {name}: new node {reader.name} reads {root.name} after {epoch} of its writes; the program"
                    f" read it only after {sorted(allowed[root])}"
                )


def _access_order(graph: torch.fx.Graph) -> tuple[dict[Node, dict[Node, int]], dict[Node, tuple[str, ...]]]:
    """Readers' write epochs and the order of writes, per storage root that is written at all."""
    root: dict[Node, Node] = {}
    writes: dict[Node, list[str]] = defaultdict(list)
    reads: list[tuple[Node, Node, int]] = []
    for node in graph.nodes:
        operands: Sequence[Node] = node.all_input_nodes
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            root[node] = node
            reads += [(node, root[a], len(writes[root[a]])) for a in operands]
            continue
        written = {a for a, is_write in _aliased(node) if is_write}
        aliased = [a for a, _ in _aliased(node)]
        reads += [(node, root[a], len(writes[root[a]])) for a in operands if a not in written]
        root[node] = root[aliased[0]] if aliased and _returns_alias(node) else node
        for a in written:
            writes[root[a]].append(node.name)
    touched = {r for r, w in writes.items() if w}
    epochs: dict[Node, dict[Node, int]] = defaultdict(dict)
    for node, r, epoch in reads:
        if r in touched:
            epochs[node][r] = epoch
    return dict(epochs), {r: tuple(w) for r, w in writes.items() if w}


def _aliased(node: Node) -> list[tuple[Node, bool]]:
    """Operands that the operator's schema marks as aliased or written: (operand, is written)."""
    found = []
    schema = node.target._schema  # type: ignore[union-attr]
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is None:
            continue
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        for value in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(value, Node):
                found.append((value, argument.alias_info.is_write))
    return found


def _returns_alias(node: Node) -> bool:
    return any(r.alias_info is not None for r in node.target._schema.returns)  # type: ignore[union-attr]


def _yields_tensor(node: Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(
        r.type.isSubtypeOf(torch._C.TensorType.get()) for r in target._schema.returns
    )


def _outputs(graph: torch.fx.Graph) -> tuple[Any, ...]:
    (output,) = graph.find_nodes(op="output")
    flat, _ = torch.utils._pytree.tree_flatten(output.args[0])
    return tuple(
        (tuple(v.shape), v.dtype)
        if isinstance(v := n.meta.get("val"), torch.Tensor)
        else type(v).__name__
        if isinstance(n, Node)
        else n
        for n in flat
        if isinstance(n, Node) or n is not None
    )


def _same(old: Any, new: Any) -> bool:
    """Equal shapes and dtypes; symbolic sizes are compared as expressions, so nothing is specialised."""
    if not (isinstance(old, tuple) and isinstance(new, tuple)):
        return bool(old == new)
    return (
        old[1] == new[1]
        and len(old[0]) == len(new[0])
        and all(str(a) == str(b) for a, b in zip(old[0], new[0], strict=True))
    )
