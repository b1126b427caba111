"""Recognize a layer of experts that was traced from a loop over all experts.

    mask = one_hot(experts)
    for each expert e:  j, t = where(mask[e]);  out[t] += weights[t, j] · W_down h(W_gate_up x[t])

transformers before 5.0 and models with their own code are written in this way. `where` makes the host wait for the
number of tokens of each expert. The weights of an expert are a slice of stacked weights, or separate parameters.

Shapes: T tokens, k experts per token, E experts, D hidden size, F intermediate size of an expert.
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

__all__ = ["Loop", "accumulators", "cut_off", "loop_of"]

aten = torch.ops.aten

_EMPTY_SUMS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
_FLATTENS = (aten.reshape.default, aten.view.default)
_COMPARISONS = (aten.greater.Scalar, aten.gt.Scalar)


@dataclass(frozen=True)
class Loop:
    """A layer of experts; its parts are the arguments of `effpass::moe_ffn`.

    Attributes:
        total: tensor into which the loop accumulates.
        anchor: last addition to `total`.
        x: hidden states [T, D].
        experts: expert ids [T, k].
        weights: routing weights [T, k].
        gate_up: stacked weight [E, 2 F, D], or for each expert gate and up [F, D], or one weight [2 F, D] with both.
        down: stacked weight [E, D, F], or for each expert its weight [D, F].
        gate: gate between the two products.
        inner: nodes that belong to the layer alone, `anchor` included.
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
    """One iteration of the loop; attributes are as in :class:`Loop`, with the weights of this expert."""

    expert: int
    x: Node
    experts: Node
    weights: Node
    gate_up: tuple[Node, ...]
    down: tuple[Node, ...]
    gate: Gate


def accumulators(graph: torch.fx.Graph) -> list[tuple[Node, list[Node]]]:
    """Return the tensors of zeros to which rows are added at indices computed by `where`, each with its additions."""
    found = []
    for node in graph.nodes:
        if node.target in _EMPTY_SUMS:
            additions = _additions(node)
            if additions and all(_places(a) is not None for a in additions):
                found.append((node, additions))
    return found


def _additions(total: Node) -> list[Node]:
    """Return the additions to `total`, whether they name `total` itself or the result of the preceding addition."""
    own = [u for u in total.users if u.target is aten.index_add_.default and u.args[0] is total]
    return own + [a for addition in own for a in _additions(addition)]


def _places(addition: Node) -> Node | None:
    """Return the ``where`` that computes the row indices of `addition`; None if there is none."""
    _, dim, rows, _ = addition.args
    rows = source(rows)
    is_second = rows.target is operator.getitem and rows.args[1] == 1 and not addition.kwargs and dim == 0
    where = rows.args[0] if is_second else None
    return where if isinstance(where, Node) and where.target is aten.where.default else None


def cut_off(graph: torch.fx.Graph) -> Node | None:
    """Return the ``one_hot`` of a graph that ends where a loop over the experts that occur begins, or None.

    transformers' `eager` experts ask for ``(one_hot(experts).permute(2, 1, 0).sum((-1, -2)) > 0).nonzero()``. Dynamo
    can't capture the loop over these values: it compiles what precedes them, and afterwards what lies between them.
    """
    for ended in graph.output_node().all_input_nodes:
        counts = ended.args[0] if ended.target in _COMPARISONS else None
        mask = counts.args[0] if isinstance(counts, Node) and counts.target is aten.sum.dim_IntList else None
        hot = source(mask.args[0]) if isinstance(mask, Node) and mask.target is aten.permute.default else None
        if hot is not None and hot.target is aten.one_hot.default:
            return hot
    return None


def loop_of(total: Node, additions: list[Node], surroundings: Surroundings) -> Loop:
    """Return the layer that accumulates into `total`.

    Args:
        total: tensor of zeros, from :func:`accumulators`.
        additions: additions to `total`.
        surroundings: order of the nodes of the program.

    Raises:
        Miss: the additions are not those of a loop over all experts.
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
    # The result is read through `total` and the additions, so their readers do not count as readers of inner nodes.
    inner = between(anchor, inputs, known, outputs={total, *additions})
    return Loop(total, anchor, first.x, first.experts, first.weights, gate_up, down, first.gate, inner)


def _turn(addition: Node) -> _Turn:
    """Return the iteration that ends with `addition`; raises :class:`Miss` if it is not that of an expert."""
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
    """Return the expert to which the mask [k, T] belongs, and the expert ids [T, k]."""
    picked = mask.target is aten.select.int and mask.args[1] == 0
    turned = source(mask.args[0]) if picked else mask
    order: Any = turned.args[1] if turned.target is aten.permute.default else ()
    hot = source(turned.args[0]) if list(order) == [2, 1, 0] else turned
    if not picked or hot.target is not aten.one_hot.default:
        raise Miss(mask, f"{mask.name} is not the mask of one expert")
    return int(mask.args[2]), source(hot.args[0])  # type: ignore[arg-type]


def _tokens(rows: Any, places: Node | None) -> Node | None:
    """Return x if `rows` are its tokens at the indices `places`, else None."""
    rows = source(rows)
    rows = source(rows.args[0]) if rows.target in _FLATTENS else rows
    if rows.target is not aten.index.Tensor:
        return None
    x, at = source(rows.args[0]), [i if i is None else source(i) for i in rows.args[1]]
    if at == [None, places] and x.target is aten.unsqueeze.default and x.args[1] == 0:
        return source(x.args[0])
    return x if at == [places] and x.meta["val"].dim() == 2 else None


def _stacked(weights: list[tuple[Node, ...]]) -> Node | tuple[tuple[Node, ...], ...]:
    """Return the stacked weight [E, …] if the weight of each expert is its slice, else the weights of all experts."""
    picked = [w[0] for w in weights if len(w) == 1 and w[0].target is aten.select.int and w[0].args[1] == 0]
    if len(picked) == len(weights):
        whole = source(picked[0].args[0])
        in_order = all(source(p.args[0]) is whole and p.args[2] == e for e, p in enumerate(picked))
        if in_order and whole.meta["val"].shape[0] == len(weights):
            return whole
    return tuple(weights)
