"""FLOPs and weight bytes of a program: what a rewrite should gain, before anyone runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.utils.flop_counter import flop_registry

if TYPE_CHECKING:
    from effpass.core.program import Program

__all__ = ["Cost", "node_flops", "total"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """Totals at the sizes the program was traced with.

    Attributes:
        flops: floating-point operations, a multiply-add counted as two.
        weight_bytes: bytes of weights (and derived weights) that one call reads.
    """

    flops: int
    weight_bytes: int


def node_flops(node: Node) -> Any:
    """FLOPs of one node, an int or an expression of the program's symbols; 0 for operators without matrix work."""
    if node.op != "call_function":
        return 0
    if node.target is aten.linear.default:
        x, weight = (a.meta["val"] for a in node.args[:2])  # type: ignore[union-attr]
        return 2 * x.numel() * weight.shape[0]
    if node.target is aten.scaled_dot_product_attention.default:
        q, k, v = (a.meta["val"] for a in node.args[:3])  # type: ignore[union-attr]
        return 2 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3])
    if node.target is aten.matmul.default:
        a, b = (x.meta["val"] for x in node.args)  # type: ignore[union-attr]
        return 2 * a.numel() * (b.shape[-1] if b.dim() > 1 else 1)
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))  # type: ignore[arg-type]
    if formula is None:
        return 0
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return formula(*args, **kwargs, out_val=node.meta["val"])


def total(program: Program) -> Cost:
    """FLOPs and weight bytes of `program` with the bodies inside it."""
    flops = sum(_hint(node_flops(n)) for part in (program, *program.bodies) for n in part.graph.nodes)
    placeholders = program.graph.find_nodes(op="placeholder")
    appended = set(placeholders[len(placeholders) - len(program.derived) :]) if program.derived else set()
    read = [n for n in placeholders if (n in program.weights or n in appended) and n.users]
    gathered = [n for n in read if all(u.target is aten.embedding.default for u in n.users)]
    return Cost(flops, sum(_bytes(n.meta["val"]) for n in read if n not in gathered))


def _bytes(value: torch.Tensor) -> int:
    return _hint(value.numel()) * value.element_size()


def _hint(value: Any) -> int:
    """The value at the traced sizes, without a guard on it."""
    if isinstance(value, torch.SymInt):
        return int(value.node.hint or 0)
    return int(value)
