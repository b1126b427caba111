"""Collect the nodes inside a layer of experts, and check that nothing outside the layer reads them."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch.fx import Node

from effpass.core.matching import writes
from effpass.passes.graph.same_value import readers

__all__ = ["Miss", "between", "readers_of"]


class Miss(Exception):
    """Raised when a candidate is not a layer of experts that can be replaced.

    Attributes:
        node: node at which the recognition failed.
        reason: why it failed, for a :class:`~effpass.core.report.Refusal`.
    """

    def __init__(self, node: Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


def between(anchor: Node, inputs: Set[Node], known: Set[Node], outputs: Set[Node] = frozenset()) -> frozenset[Node]:
    """Return the nodes between `inputs` and `anchor`, including writes to their tensors and checks of their sizes.

    Args:
        anchor: last node.
        inputs: nodes at which the search stops; they are not included.
        known: in-place operators whose effect the caller accounts for.
        outputs: further nodes that, like `anchor`, may be read from outside.

    Raises:
        Miss: one of the nodes is read from outside, or is an in-place operator that is not in `known`.
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
    """Whether `node` is an assertion, or computes numbers that only assertions read."""
    if _is_check(node):
        return True
    return node.op == "call_function" and not _holds_tensors(node) and all(map(_only_checks, node.users))


def _is_check(node: Node) -> bool:
    return getattr(node.target, "_opname", "").startswith(("_assert", "sym_constrain"))


def readers_of(node: Node) -> list[Node]:
    """Return the nodes that read the value of `node`, without assertions on its sizes."""
    return [reader for reader in readers(node) if not _only_checks(reader)]


def _holds_tensors(node: Node) -> bool:
    value = node.meta.get("val")
    return node.op == "output" or isinstance(value, (torch.Tensor, tuple, list))
