"""Finds attention in a program, whichever implementation the model was loaded with.

    out = softmax(scale · q kᵀ + mask) v

A model loaded with `sdpa` gives one node; one loaded with `eager` gives a chain of matmul, scale, mask, softmax and
matmul; one loaded with FlashAttention gives a custom operator with another layout. :func:`attentions` yields the same
description for all three, so that a pass is written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.fx import Node

if TYPE_CHECKING:
    from effpass.core.program import Program

__all__ = ["Attention", "attentions"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Attention:
    """One attention of a program.

    Shapes are given for the layout ``"BHTD"``, with B sequences, H query heads, G KV heads, T queries, S keys, key size
    K and value size V. In the layout ``"BTHD"``, the dimensions of heads and positions are swapped.

    Attributes:
        node: node of the output `[B, H, T, V]`.
        query: node of the queries `[B, H, T, K]`.
        key: node of the keys `[B, G, S, K]`, before they are repeated for the query heads of each group.
        value: node of the values `[B, G, S, V]`, before they are repeated.
        mask: node of the additive or boolean mask, broadcastable to `[B, H, T, S]`; None without a mask.
        scale: factor of the scores; None stands for K^-½.
        is_causal: whether position t attends only to positions ≤ t, in addition to `mask`.
        implementation: attention implementation of the model.
        layout: order of the dimensions of queries, keys, values and output.
    """

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    scale: float | Node | None
    is_causal: bool
    implementation: Literal["sdpa", "eager", "flash"]
    layout: Literal["BHTD", "BTHD"] = "BHTD"


def attentions(program: Program) -> Iterator[Attention]:
    """Yield every attention of `program` in graph order."""
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.scaled_dot_product_attention.default:
            yield _sdpa(node)
        elif node.target in (aten.softmax.int, aten._softmax.default):
            found = _eager(node)
            if found is not None:
                yield found
        elif isinstance(node.target, torch._ops.OpOverload) and _is_flash(node.target):
            yield _flash(node)


def _arguments(node: Node) -> dict[str, Any]:
    """The arguments of the call by their names in the operator's schema, including defaults."""
    schema = node.target._schema  # type: ignore[union-attr]
    given: dict[str, Any] = {a.name: a.default_value for a in schema.arguments}
    given.update({a.name: value for a, value in zip(schema.arguments, node.args, strict=False)})
    given.update(node.kwargs)
    return given


def _sdpa(node: Node) -> Attention:
    a = _arguments(node)
    key, value = _before_repeat(a["key"]), _before_repeat(a["value"])
    return Attention(node, a["query"], key, value, a["attn_mask"], a["scale"], bool(a["is_causal"]), "sdpa")


def _eager(softmax: Node) -> Attention | None:
    scores = _skip(softmax.args[0], (aten.to.dtype, aten._to_copy.default))
    mask: Any = None
    if scores.target is aten.add.Tensor and isinstance(scores.args[1], Node):
        scores, mask = scores.args  # type: ignore[assignment]
    scale: Any = 1.0
    if scores.target in (aten.mul.Tensor, aten.mul.Scalar):
        scores, scale = scores.args  # type: ignore[assignment]
    elif scores.target is aten.div.Tensor and isinstance(scores.args[1], (int, float)):
        scale = 1.0 / scores.args[1]
        scores = scores.args[0]  # type: ignore[assignment]
    if not (isinstance(scores, Node) and scores.target is aten.matmul.default):
        return None
    query, transposed = scores.args
    if not (isinstance(transposed, Node) and transposed.target is aten.transpose.int):
        return None
    output = softmax
    while output.target is not aten.matmul.default:
        users = list(output.users)
        passes_through = (
            aten.softmax.int,
            aten._softmax.default,
            aten.to.dtype,
            aten._to_copy.default,
            aten.dropout.default,
        )
        if len(users) != 1 or output.target not in passes_through:
            return None
        output = users[0]
    assert isinstance(query, Node)
    key, value = transposed.args[0], output.args[1]
    return Attention(output, query, _before_repeat(key), _before_repeat(value), mask, scale, False, "eager")


def _is_flash(target: torch._ops.OpOverload) -> bool:
    return "flash" in target.namespace and {"q", "k", "v"} <= {a.name for a in target._schema.arguments}


def _flash(node: Node) -> Attention:
    a = _arguments(node)
    output = next((u for u in node.users if u.args[1:] == (0,)), node) if isinstance(node.meta["val"], tuple) else node
    causal = bool(a.get("causal", a.get("is_causal", False)))
    return Attention(output, a["q"], a["k"], a["v"], None, a.get("softmax_scale"), causal, "flash", "BTHD")


def _skip(node: Any, targets: tuple[Any, ...]) -> Node:
    while node.target in targets:
        node = node.args[0]
    return node


def _before_repeat(node: Any) -> Node:
    """The key or value before transformers' `repeat_kv` (unsqueeze, expand over the group, reshape), if applied."""
    expand = node.args[0] if node.target in (aten.reshape.default, aten.view.default) else None
    if isinstance(expand, Node) and expand.target is aten.clone.default:
        expand = expand.args[0]
    if not (isinstance(expand, Node) and expand.target is aten.expand.default):
        return node
    unsqueeze = expand.args[0]
    while isinstance(unsqueeze, Node) and unsqueeze.target is aten.slice.Tensor:
        unsqueeze = unsqueeze.args[0]
    if not (isinstance(unsqueeze, Node) and unsqueeze.target is aten.unsqueeze.default and unsqueeze.args[1] == 2):
        return node
    original = unsqueeze.args[0]
    assert isinstance(original, Node)
    return original
