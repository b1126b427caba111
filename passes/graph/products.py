"""What surrounds matrix products: gates, and values added to them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from effpass.core.program import Linear
from effpass.passes.graph.same_value import readers, source

__all__ = ["Gate", "gates_among", "residual_of"]

aten = torch.ops.aten

_ACTIVATIONS: dict[Any, str] = {aten.silu.default: "silu", aten.relu.default: "relu"}


@dataclass(frozen=True)
class Gate:
    """``act(gate(x)) * up(x)``, and nothing else reads what is between.

    Attributes:
        linears: gate and up; one linear where they are the two halves of its rows (Phi-3).
        product: the node of the product.
        activation: as `effpass::gated_linear` names it.
        inner: nodes between the linears and the product.
        gate_first: whether the gate is the first half, where there is one linear.
    """

    linears: tuple[Linear, ...]
    product: Node
    activation: str
    inner: tuple[Node, ...]
    gate_first: bool = True


def gates_among(linears: Sequence[Linear]) -> Iterator[Gate]:
    """The gates whose linears are among `linears`, which all read one value; none of those has a bias."""
    unbiased = {linear.node: linear for linear in linears if linear.bias is None}
    for linear in unbiased.values():
        reader = _only_reader(linear.node)
        if reader is None:
            continue
        if reader.target is aten.chunk.default:
            gate = _packed(linear, reader)
            if gate is not None:
                yield gate
            continue
        found = _activated(linear.node)
        if found is None:
            continue
        activation, activated, product, other = found
        up = unbiased.get(source(other))
        if up is not None and up is not linear and _only_reader(up.node) is product:
            yield Gate((linear, up), product, activation, (activated,))


def _packed(linear: Linear, chunk: Node) -> Gate | None:
    """Gate and up as the two halves of one product along its last dimension."""
    last = linear.node.meta["val"].dim() - 1
    if chunk.args[1] != 2 or chunk.args[2:] not in ((-1,), (last,)) or linear.weight.meta["val"].shape[0] % 2:
        return None
    halves = {user.args[1]: user for user in chunk.users if user.target is operator.getitem}
    for place, half in halves.items():
        found = _activated(half)
        if found is None or len(halves) < 2:
            continue
        activation, activated, product, other = found
        up = halves[1 - place]  # type: ignore[operator]
        if source(other) is up and _only_reader(up) is product:
            return Gate(
                (linear,), product, activation, (chunk, *halves.values(), activated), gate_first=bool(place == 0)
            )
    return None


def _activated(node: Node) -> tuple[str, Node, Node, Any] | None:
    """An activation of `node`, its node, the product it goes into and the other factor, if nothing else reads them."""
    activated = _only_reader(node)
    name = None if activated is None else _activation(activated)
    product = None if name is None else _only_reader(activated)  # type: ignore[arg-type]
    if product is None or product.target is not aten.mul.Tensor:
        return None
    factors = [factor for factor in product.args if source(factor) is not activated]
    if len(factors) != 1 or not isinstance(factors[0], Node):
        return None
    assert activated is not None
    assert name is not None
    return name, activated, product, factors[0]


def _activation(node: Node) -> str | None:
    if node.target is aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(node.kwargs.get("approximate", "none")))
    return _ACTIVATIONS.get(node.target)


def residual_of(linear: Linear, position: Mapping[Node, int]) -> tuple[Node, Node | None]:
    """The addition that alone reads `linear`, and what it adds; the linear's node and None where there is none.

    Of two products that are added to each other the later one has the earlier one as its residual.
    """
    add = _only_reader(linear.node)
    if add is None or add.target is not aten.add.Tensor or add.kwargs:
        return linear.node, None
    others = [other for term in add.args if (other := source(term)) is not linear.node]
    if len(others) != 1 or not isinstance(others[0], Node):
        return linear.node, None
    other = others[0]
    is_later_product = other.target is aten.linear.default and position[other] > position[linear.node]
    if is_later_product or other.meta["val"].shape != linear.node.meta["val"].shape:
        return linear.node, None
    return add, other


def _only_reader(node: Node) -> Node | None:
    found = readers(node)
    return found[0] if len(found) == 1 else None
