"""Helpers that look through nodes which pass their input on unchanged, to the nodes that compute or read a value.

Such nodes are aliases, casts to the dtype and device that a tensor already has, and dropout outside training. The
pattern recognizers of the graph passes use these helpers so that they need not handle such nodes themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from effpass.core.matching import is_noop_cast

__all__ = ["cast_of", "dtype_of", "readers", "source"]

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default)


def source(node: Any) -> Any:
    """Return the node that computes the value of `node`, skipping nodes that pass it on unchanged."""
    while isinstance(node, Node) and _hands_on(node):
        node = node.args[0]
    return node


def readers(node: Node) -> list[Node]:
    """Return the nodes that read the value of `node`, directly or through nodes that pass it on unchanged."""
    found: dict[Node, None] = {}
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if _hands_on(user):
                waiting.append(user)
            else:
                found[user] = None
    return list(found)


def cast_of(node: Any) -> Any:
    """Return the operand of `node` if it casts a tensor to another dtype on the same device, else None."""
    node = source(node)
    if not isinstance(node, Node) or node.target not in _CASTS:
        return None
    before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return source(node.args[0]) if before.device == after.device else None


def dtype_of(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


def _hands_on(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is aten.dropout.default:
        return node.args[2] is False
    return node.target is aten.alias.default or is_noop_cast(node)
