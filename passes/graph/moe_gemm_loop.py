"""Recognise a layer of experts written as a loop over all of them, unrolled.

    mask = one_hot(experts)
    for each expert e:  j, t = where(mask[e]);  out[t] += weights[t, j] · W_down h(W_gate_up x[t])

This is how transformers before 5.0, and models with code of their own, write it. The tokens of an expert are counted on
the host there, once for each. Weights are rows of stacked ones, or each expert has its own.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from effpass.core.matching import Surroundings
from effpass.passes.graph.moe_gemm_gate import Gate, gate_at, gate_of_two
from effpass.passes.graph.moe_gemm_inside import Miss, between, readers_of
from effpass.passes.graph.same_value import cast_of, source

__all__ = ["Loop", "accumulators", "loop_of"]

aten = torch.ops.aten

_EMPTY_SUMS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
_FLATTENS = (aten.reshape.default, aten.view.default)


@dataclass(frozen=True)
class Loop:
    """One layer; see `effpass::moe_ffn` for what its parts mean.

    Attributes:
        total: the tensor that the loop adds into.
        anchor: its last addition.
        gate_up: [E, 2 F, D], or for each expert gate and up [F, D], or both in one [2 F, D].
        down: [E, D, F], or for each expert [D, F].
        inner: the nodes that compute nothing else.
    """

    total: Node
    anchor: Node
    x: Node
    experts: Node
    weights: Node
    gate_up: Node | tuple[tuple[Node, ...], ...]
    down: Node | tuple[tuple[Node, ...], ...]
    gate: Gate
    inner: frozenset[Node]


@dataclass(frozen=True)
class _Turn:
    """What the loop does for one expert; weights are nodes, or the place of a stacked one."""

    expert: int
    x: Node
    experts: Node
    weights: Node
    gate_up: tuple[Node, ...]
    down: tuple[Node, ...]
    gate: Gate


def accumulators(graph: torch.fx.Graph) -> list[tuple[Node, list[Node]]]:
    """Each tensor of zeros into which rows are added at places that a mask names, with the additions."""
    found = []
    for node in graph.nodes:
        if node.target in _EMPTY_SUMS:
            additions = _additions(node)
            if additions and all(_places(a) is not None for a in additions):
                found.append((node, additions))
    return found


def _additions(total: Node) -> list[Node]:
    """The additions into `total`, by its own name or as what the one before returns."""
    own = [u for u in total.users if u.target is aten.index_add_.default and u.args[0] is total]
    return own + [a for addition in own for a in _additions(addition)]


def _places(addition: Node) -> Node | None:
    """The ``where`` that names the rows of `addition`."""
    _, dim, rows, _ = addition.args
    rows = source(rows)
    is_second = rows.target is operator.getitem and rows.args[1] == 1 and not addition.kwargs and dim == 0
    where = rows.args[0] if is_second else None
    return where if isinstance(where, Node) and where.target is aten.where.default else None


def loop_of(total: Node, additions: list[Node], surroundings: Surroundings) -> Loop:
    """The layer that adds into `total`.

    Raises:
        Miss: it is no loop over all experts.
    """
    additions = sorted(additions, key=surroundings.position.__getitem__)
    anchor, turns = additions[-1], [_turn(addition) for addition in additions]
    first = turns[0]
    for addition, turn in zip(additions, turns, strict=True):
        if (turn.x, turn.experts, turn.weights) != (first.x, first.experts, first.weights):
            raise Miss(addition, "its experts read different tokens, ids or weights")
        same = (turn.gate.activation, turn.gate.alpha, turn.gate.limit, turn.gate.offset, turn.gate.interleaved)
        gate = first.gate
        if same != (gate.activation, gate.alpha, gate.limit, gate.offset, gate.interleaved):
            raise Miss(addition, "its experts have different gates")
    if [turn.expert for turn in turns] != list(range(len(turns))):
        raise Miss(anchor, f"its loop goes over experts {[turn.expert for turn in turns]}")
    if total.meta["val"].dtype != first.x.meta["val"].dtype or total.meta["val"].shape != first.x.meta["val"].shape:
        raise Miss(anchor, f"it adds in {total.meta['val'].dtype}, and {first.x.name} is {first.x.meta['val'].dtype}")
    known = set(additions)
    for node in (total, *additions):
        for reader in readers_of(node):
            if reader not in known and surroundings.position[reader] < surroundings.position[anchor]:
                raise Miss(anchor, f"{reader.name} reads the sum before its end")
    gate_up, down = (_stacked([getattr(turn, name) for turn in turns]) for name in ("gate_up", "down"))
    inputs = {first.x, first.experts, first.weights}
    for weight in (gate_up, down):
        inputs |= {weight} if isinstance(weight, Node) else {node for parts in weight for node in parts}
    # What the loop leaves is read through the tensor that it added into, which is no reader of its inside.
    inner = between(anchor, inputs, known, outputs={total, *additions})
    return Loop(total, anchor, first.x, first.experts, first.weights, gate_up, down, first.gate, inner)


def _turn(addition: Node) -> _Turn:
    where = _places(addition)
    assert where is not None
    places, rows = (
        next((u for u in where.users if u.target is operator.getitem and u.args[1] == i), None) for i in (0, 1)
    )
    expert, experts = _expert(source(where.args[0]))
    scaled = source(addition.args[3])
    product = cast_of(scaled) or scaled
    if product.target is not aten.mul.Tensor:
        raise Miss(addition, f"{product.name} is no product with the experts' weights")
    for output, scale in (product.args, product.args[::-1]):
        output, scale = source(output), source(scale)
        if output.target is aten.linear.default and scale.target is aten.index.Tensor:
            break
    else:
        raise Miss(addition, f"{product.name} is no product of an expert's output with its weight")
    weights = source(scale.args[0])
    weights = source(weights.args[0]) if weights.target is aten.unsqueeze.default else weights
    chosen = [source(i) for i in scale.args[1] if isinstance(i, Node)]
    if chosen != [rows, places] or weights.meta["val"].shape != experts.meta["val"].shape:
        raise Miss(addition, f"{scale.name} is not the weight of each token for this expert")
    if len(output.args) > 2 and output.args[2] is not None:
        raise Miss(addition, f"{output.name} has a bias")
    gate, firsts = gate_of_two(output.args[0])
    packed = gate_at(output.args[0])
    if packed is not None:
        gate, firsts = packed, (source(packed.projected),)
    if gate is None or any(f.target is not aten.linear.default or len(f.args) > 2 for f in firsts):
        raise Miss(addition, f"{output.name} does not read a gate of products without a bias")
    xs = {_tokens(f.args[0], rows) for f in firsts}
    x = xs.pop()
    if x is None or xs:
        raise Miss(addition, f"{firsts[0].name} does not read the rows of this expert's tokens")
    return _Turn(expert, x, experts, weights, tuple(source(f.args[1]) for f in firsts), (source(output.args[1]),), gate)


def _expert(mask: Node) -> tuple[int, Node]:
    """The expert whose mask [k, T] this is, and the ids [T, k]."""
    picked = mask.target is aten.select.int and mask.args[1] == 0
    turned = source(mask.args[0]) if picked else mask
    order: Any = turned.args[1] if turned.target is aten.permute.default else ()
    hot = source(turned.args[0]) if list(order) == [2, 1, 0] else turned
    if not picked or hot.target is not aten.one_hot.default:
        raise Miss(mask, f"{mask.name} is not the mask of one expert")
    return int(mask.args[2]), source(hot.args[0])  # type: ignore[arg-type]


def _tokens(rows: Any, places: Node | None) -> Node | None:
    """x, of which `rows` are the tokens at `places`."""
    rows = source(rows)
    rows = source(rows.args[0]) if rows.target in _FLATTENS else rows
    if rows.target is not aten.index.Tensor:
        return None
    x, at = source(rows.args[0]), [i if i is None else source(i) for i in rows.args[1]]
    if at == [None, places] and x.target is aten.unsqueeze.default and x.args[1] == 0:
        return source(x.args[0])
    return x if at == [places] and x.meta["val"].dim() == 2 else None


def _stacked(weights: list[tuple[Node, ...]]) -> Node | tuple[tuple[Node, ...], ...]:
    """The weight [E, …] of which every expert's is its row; else all of them."""
    picked = [w[0] for w in weights if len(w) == 1 and w[0].target is aten.select.int and w[0].args[1] == 0]
    if len(picked) == len(weights):
        whole = source(picked[0].args[0])
        in_order = all(source(p.args[0]) is whole and p.args[2] == e for e, p in enumerate(picked))
        if in_order and whole.meta["val"].shape[0] == len(weights):
            return whole
    return tuple(weights)
