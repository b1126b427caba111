"""`fuse_linears`: fuse matrix products of few tokens with the RMSNorm, gate or residual around them.

    y₁, y₂, … = W₁ n(x) + b₁, W₂ n(x) + b₂, …        products that read the same value, with the norm before them
    y = W n(x) + b + r                               one product with a residual r
    y = act(W_gate n(x)) · W_up n(x)                 first half of a gated feed-forward layer

n is an RMSNorm, or the identity if there is none; W and b are weights and biases, act is an activation. Each form
becomes one operator of :mod:`effpass.lowering.ops.fused_linear` and thus one kernel launch. In a decode step with one
token, a decoder layer consists of some twenty kernel launches; after this pass, four remain in addition to attention.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from effpass.core.inline import program_values
from effpass.core.matching import Surroundings
from effpass.core.pass_ import GraphPass, Match
from effpass.core.pattern import erase_unread
from effpass.core.program import Linear, Program
from effpass.core.report import Refusal
from effpass.lowering.ops import fused_linear as operators
from effpass.passes.graph.few_rows import why_no_kernel, why_not_here, why_not_program
from effpass.passes.graph.products import Gate, gates_among, residual_of
from effpass.passes.graph.rms_norm import RMSNorm, rms_norm_at
from effpass.passes.graph.same_value import readers, source

__all__ = ["FuseLinears"]

aten = torch.ops.aten

# Maximum number of weights that one kernel launch reads.
_MAX_WEIGHTS = 3

# Metadata that a new node takes over from the node that it replaces.
_KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")


@dataclass(frozen=True)
class _Site:
    """Nodes that are replaced by one operator.

    Attributes:
        x: value that the products read; the output of the norm if there is one.
        linears: the products, in graph order.
        anchor: node before which the new operator is inserted.
        gate: gate whose products are `linears`; None if they are not those of a gate.
        residual: value that is added to the only product; None if there is none.
        norm: norm to fuse into the operator; None if there is none.
        selected: slices between the norm and the products, the last one first. They select along other dimensions than
            the normalized one, so the norm can be applied after them.
    """

    x: Node
    linears: tuple[Linear, ...]
    anchor: Node
    gate: Gate | None = None
    residual: Node | None = None
    norm: RMSNorm | None = None
    selected: tuple[Node, ...] = ()

    @property
    def operands(self) -> list[Node]:
        """Tensors that the new operator reads in addition to the input: weights, biases and the residual."""
        norm_weight = None if self.norm is None else self.norm.weight
        tensors = [t for linear in self.linears for t in (linear.weight, linear.bias)]
        return [t for t in (*tensors, self.residual, norm_weight) if t is not None]

    @property
    def replaced(self) -> list[Node]:
        """Nodes whose computation the new operator takes over."""
        inner = () if self.norm is None else (*self.norm.inner, *self.selected)
        gate = () if self.gate is None else self.gate.inner
        return [*(linear.node for linear in self.linears), *inner, *gate, self.anchor]


class FuseLinears(GraphPass):
    """Makes RMSNorm, the products that read it, gates and residuals one launch each, at few rows."""

    name = "fuse_linears"
    exact = True

    def could_act(self, weight_names: Sequence[str]) -> bool:
        return torch.cuda.is_available()

    def find(self, program: Program) -> Iterator[Match | Refusal]:
        if refusal := why_not_program(program):
            yield refusal
            return
        surroundings = Surroundings.of(program)
        derived = set(program.derived_nodes.values())
        reading: dict[Node, list[Linear]] = {}
        for linear in program.linears():
            weight = source(linear.weight)
            if linear.transposed or weight.meta["val"].dim() != 2:
                yield Refusal(linear.node.name, "its weight is not stored [out, in]")
            elif weight.op == "call_function" and weight not in derived:
                # The kernel prefetches weights before the preceding launch has finished, and that launch might be the
                # one that computes them.
                yield Refusal(linear.node.name, "its weight is computed in the graph")
            else:
                reading.setdefault(source(linear.x), []).append(linear)
        matches: list[Match] = []
        for x, linears in reading.items():
            for found in _around(x, linears, surroundings):
                if isinstance(found, Refusal):
                    yield found
                else:
                    matches.append(Match(found.anchor, {"site": found}))
        # In reverse graph order: an operand may be a value that an earlier site computes, which must still exist.
        yield from sorted(matches, key=lambda match: -surroundings.position[match.anchor])

    def rewrite(self, program: Program, match: Match) -> None:
        site: _Site = match.nodes["site"]
        with program.graph.inserting_before(site.anchor):
            old, new = _gated(program, site, site.gate) if site.gate is not None else _fused(program, site)
        for node, value in zip(old, new, strict=True):
            node.replace_all_uses_with(value)
            erase_unread(program, node)


# -- finding ----------------------------------------------------------------------------------------------------------


def _around(x: Node, linears: Sequence[Linear], surroundings: Surroundings) -> Iterator[_Site | Refusal]:
    """Yield the sites among `linears`, which all read `x`, and a refusal for each candidate that can't be rewritten."""
    sites = [_Site(x, gate.linears, gate.product, gate=gate) for gate in gates_among(linears)]
    in_gates = {linear.node for site in sites for linear in site.linears}
    rest = tuple(linear for linear in linears if linear.node not in in_gates)
    for group in (rest[start : start + _MAX_WEIGHTS] for start in range(0, len(rest), _MAX_WEIGHTS)):
        add, residual = residual_of(group[0], surroundings.position) if len(group) == 1 else (group[0].node, None)
        sites.append(_Site(x, group, add, residual=residual))
    norm, selected = _norm_before(x)
    with_norm = sites if norm is None else [replace(site, norm=norm, selected=selected) for site in sites]
    serving: list[_Site] = []
    for site in with_norm:
        if norm is None and len(site.linears) == 1 and site.residual is None and site.gate is None:
            continue  # a single product with nothing to fuse
        reason = _why_not(site, surroundings)
        if reason is not None:
            yield Refusal(site.anchor.name, *reason)
        else:
            serving.append(site)
    if norm is not None and serving:
        others = _other_readers(norm, selected, {linear.node for site in serving for linear in site.linears})
        if others:
            yield Refusal(norm.node.name, f"the norm stays: its value is also read by {others[0].name}")
            serving = [replace(site, norm=None, selected=()) for site in serving]
    for site in serving:
        if site.norm or site.gate or site.residual or len(site.linears) > 1:
            yield site


def _why_not(site: _Site, surroundings: Surroundings) -> tuple[str, str] | None:
    if refusal := why_no_kernel(site.x, site.x.meta["val"].shape[:-1], site.operands, operators.has_kernel):
        return refusal
    at = surroundings.position[site.anchor]
    late = next((t for t in site.operands if surroundings.position[t] >= at), None)
    if late is not None:
        return f"{late.name} is computed after {site.anchor.name}", ""
    reason = why_not_here(surroundings, site.replaced, site.anchor)
    return None if reason is None else (reason, "")


def _norm_before(x: Node) -> tuple[RMSNorm | None, tuple[Node, ...]]:
    """Return the norm that computes `x`, and the slices between them, none of which cut the normalized dimension."""
    selected: list[Node] = []
    while x.target is aten.slice.Tensor and x.args[1:2] not in ((), (-1,), (x.meta["val"].dim() - 1,)):
        selected.append(x)
        x = source(x.args[0])
    norm = rms_norm_at(x)
    return norm, tuple(selected) if norm is not None else ()


def _other_readers(norm: RMSNorm, selected: tuple[Node, ...], linears: set[Node]) -> list[Node]:
    """Return the nodes other than `linears` that read the norm's value or one of the slices before the products."""
    chain = {norm.node, *selected}
    return [r for node in chain for r in readers(node) if r not in linears and r not in chain]


# -- rewriting --------------------------------------------------------------------------------------------------------


def _fused(program: Program, site: _Site) -> tuple[list[Node], list[Node]]:
    """Insert `fused_linear`; return the replaced nodes, and the new node for each of them."""
    x, *norm = _normalized(program, site)
    old = [site.anchor] if site.residual is not None else [linear.node for linear in site.linears]
    weights, biases = [linear.weight for linear in site.linears], [linear.bias for linear in site.linears]
    target = torch.ops.effpass.fused_linear.default
    outputs = _call(program, target, (x, weights, biases, *norm, site.residual), site.linears[0].node)
    outputs.meta["val"] = [node.meta["val"] for node in old]
    new = [_call(program, operator.getitem, (outputs, place), node) for place, node in enumerate(old)]
    for before, after in zip(old, new, strict=True):
        after.meta["val"] = before.meta["val"]
    return old, new


def _gated(program: Program, site: _Site, gate: Gate) -> tuple[list[Node], list[Node]]:
    """Insert `gated_linear`; return the replaced node and the new one."""
    x, *norm = _normalized(program, site)
    weights = [linear.weight for linear in gate.linears]
    if len(weights) == 1:  # gate and up are the two halves of its rows; the slices are views
        half = weights[0].meta["val"].shape[0] // 2
        weights = [_slice(program, weights[0], (0, start, start + half), gate.product) for start in (0, half)]
        weights = weights if gate.gate_first else weights[::-1]
    new = _call(program, torch.ops.effpass.gated_linear.default, (x, *weights, *norm, gate.activation), gate.product)
    new.meta["val"] = gate.product.meta["val"]
    return [gate.product], [new]


def _normalized(program: Program, site: _Site) -> tuple[Node, Node | None, float, float]:
    """Return the input of the new operator, and the weight, ε and offset of the norm that it applies."""
    if site.norm is None:
        return site.x, None, 0.0, 0.0
    x = site.norm.x
    for selection in reversed(site.selected):
        x = _slice(program, x, tuple(selection.args[1:]), selection)
    return x, site.norm.weight, site.norm.eps, site.norm.offset


def _slice(program: Program, node: Node, bounds: tuple[Any, ...], old: Node) -> Node:
    new = _call(program, aten.slice.Tensor, (node, *bounds), old)
    with program_values(program):
        new.meta["val"] = aten.slice.Tensor(node.meta["val"], *bounds)
    return new


def _call(program: Program, target: Any, arguments: tuple[Any, ...], old: Node) -> Node:
    """Insert a call of `target` that takes over the metadata of `old` on its place in the model."""
    new = program.graph.call_function(target, arguments)
    new.meta.update({key: old.meta[key] for key in _KEPT_META if key in old.meta})
    return new
