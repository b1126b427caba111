"""Recognize the operators around matrix products that `fuse_linears` fuses with them: gates and residuals."""

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
    """``act(gate(x)) * up(x)``, whose intermediate values are read by nothing else.

    Attributes:
        linears: linears of gate and up, or a single linear whose output holds both as halves (Phi-3).
        product: node of the elementwise product.
        activation: name of the activation as `effpass::gated_linear` takes it.
        inner: nodes between the linears and the product.
        gate_first: for a single linear, whether the gate is the first half of its output.
    """

    linears: tuple[Linear, ...]
    product: Node
    activation: str
    inner: tuple[Node, ...]
    gate_first: bool = True


def gates_among(linears: Sequence[Linear]) -> Iterator[Gate]:
    """Yield the gates whose linears are among `linears`, which all read one value. Linears with a bias are skipped."""
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
    """Match a gate whose gate and up are the two halves of one linear's output along its last dimension."""
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
    """Match an activation of `node` that is multiplied by another value; nothing else may read the intermediate values.

    Returns:
        The name of the activation, its node, the node of the product, and the other factor.
    """
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
    """Return the addition that is the only reader of `linear`, and its other term, the residual.

    Without such an addition, returns the node of the linear and None. If two linears are added to each other, the
    earlier one is the residual of the later one.
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
