"""What lies inside a layer of experts, and who reads it."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch.fx import Node

from effpass.core.matching import writes
from effpass.passes.graph.same_value import readers

__all__ = ["Miss", "between", "readers_of"]


class Miss(Exception):
    """Why there is no layer, and at which node."""

    def __init__(self, node: Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


def between(anchor: Node, inputs: Set[Node], known: Set[Node], outputs: Set[Node] = frozenset()) -> frozenset[Node]:
    """What only `anchor` needs of what is computed from `inputs`: tensors, what writes into them, what checks them.

    Args:
        anchor: the last node.
        inputs: where to stop.
        known: operators in place whose effect is understood.
        outputs: nodes that others may read, like `anchor`.

    Raises:
        Miss: one of them is read elsewhere, or written by an operator that is not `known`.
    """
    found: set[Node] = set()
    waiting = [anchor]
    while waiting:
        node = waiting.pop()
        if node in found or node in inputs or node.op != "call_function" or not _holds_tensors(node):
            continue
        found.add(node)
        waiting += node.all_input_nodes
        waiting += [user for user in node.users if writes(user) and user.args[0] is node]
    outputs = {anchor, *outputs}
    checks = {user for node in found - outputs for user in node.users if _only_checks(user)}
    while more := {u for node in checks for u in node.users} - checks:
        checks |= more
    for node in found:
        if writes(node) and node not in known:
            raise Miss(node, f"{node.name} writes in place between the products")
        for user in node.users:
            if node not in outputs and user not in found and user not in checks:
                raise Miss(node, f"its value is also read by {user.name}")
    return frozenset(found | checks)


def _only_checks(node: Node) -> bool:
    """Whether a node computes nothing but numbers that are compared and checked."""
    if _is_check(node):
        return True
    return node.op == "call_function" and not _holds_tensors(node) and all(map(_only_checks, node.users))


def _is_check(node: Node) -> bool:
    return getattr(node.target, "_opname", "").startswith(("_assert", "sym_constrain"))


def readers_of(node: Node) -> list[Node]:
    """Who reads the value of `node`, but for checks of its type and size."""
    return [reader for reader in readers(node) if not _only_checks(reader)]


def _holds_tensors(node: Node) -> bool:
    value = node.meta.get("val")
    return node.op == "output" or isinstance(value, (torch.Tensor, tuple, list))
