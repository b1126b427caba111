"""Nodes that hand on the value they are given, and who really computes or reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from effpass.core.matching import is_no_cast

__all__ = ["cast_of", "dtype_of", "readers", "source"]

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default)


def source(node: Any) -> Any:
    """What computes the value of `node`: aliases, casts to the same type and dropout outside training are passed."""
    while isinstance(node, Node) and _hands_on(node):
        node = node.args[0]
    return node


def readers(node: Node) -> list[Node]:
    """Who reads the value of `node`, through nodes that only hand it on."""
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
    """What `node` casts from another type to its own; None when it is no such cast."""
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
    return node.target is aten.alias.default or is_no_cast(node)
