"""`fuse_rotary_table`: compute the cosines and sines of rotary embedding with one kernel.

    a = p · f;  cos, sin = (cat(a, a).cos() · s).to(dtype), (cat(a, a).sin() · s).to(dtype)

p are positions, f frequencies, a the rotation angles, and s is a scaling factor. transformers computes the table once
per forward pass. In a decode step with one token, its cost is that of nine to eleven kernel launches.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.fx import Node

from effpass.core.matching import Surroundings
from effpass.core.pass_ import GraphPass, Match
from effpass.core.pattern import erase_unread
from effpass.core.program import Program
from effpass.core.report import Refusal
from effpass.lowering.ops import rotary_table as operators
from effpass.passes.graph.few_rows import why_no_kernel, why_not_here, why_not_program
from effpass.passes.graph.rotary_angles import Angles, angles_at
from effpass.passes.graph.same_value import readers, source

__all__ = ["FuseRotaryTable"]

aten = torch.ops.aten


class FuseRotaryTable(GraphPass):
    """Computes the cosines and sines of rotary embedding from positions with one kernel."""

    name = "fuse_rotary_table"
    exact = True

    def could_act(self, weight_names: Sequence[str]) -> bool:
        return torch.cuda.is_available()

    def find(self, program: Program) -> Iterator[Match | Refusal]:
        tables = [table for node in program.graph.nodes if (table := _table_at(node)) is not None]
        if tables and (refusal := why_not_program(program)):
            yield refusal
            return
        surroundings = Surroundings.of(program)
        for table in tables:
            # Both are read only after the first of them.
            anchor = min(table.cos, table.sin, key=lambda node: surroundings.position[node])
            angles = angles_at(table.angles)
            if angles is None:
                yield Refusal(anchor.name, f"{table.angles.name} is no product of positions and frequencies")
            # The number of positions, dynamic or not, does not matter: one launch is best for any.
            elif no_kernel := why_no_kernel(table.angles, sizes=(), others=(), has_kernel=operators.has_kernel):
                yield Refusal(anchor.name, *no_kernel)
            elif not_here := why_not_here(surroundings, (*angles.inner, *table.inner), anchor):
                yield Refusal(anchor.name, not_here)
            else:
                yield Match(anchor, {"table": table, "angles": angles})

    def rewrite(self, program: Program, match: Match) -> None:
        found: _Table = match.nodes["table"]
        angles: Angles = match.nodes["angles"]
        old = (found.cos, found.sin)
        dtype = found.cos.meta["val"].dtype
        with program.graph.inserting_before(match.anchor):
            table = program.graph.call_function(
                torch.ops.effpass.rotary_table.default, (angles.positions, angles.frequencies, found.scaling, dtype)
            )
            table.meta.update(match.anchor.meta)
            table.meta["val"] = tuple(node.meta["val"] for node in old)
            new = [program.graph.call_function(operator.getitem, (table, place)) for place in range(2)]
        for before, after in zip(old, new, strict=True):
            after.meta.update(before.meta)
            before.replace_all_uses_with(after)
            erase_unread(program, before)


class _Table(NamedTuple):
    """A matched table of cosines and sines.

    Attributes:
        angles: the angles, of which the table holds two copies side by side.
        scaling: factor of the cosines and sines.
        cos: the final node of the cosines.
        sin: the final node of the sines.
        inner: all nodes from the concatenation of the angles to `cos` and `sin`.
    """

    angles: Node
    scaling: float
    cos: Node
    sin: Node
    inner: list[Node]


def _table_at(node: Node) -> _Table | None:
    """Match a table that begins at `node`, a concatenation of angles with themselves that only a cos and a sin read."""
    if node.target is not aten.cat.default or len(node.args[0]) != 2:  # type: ignore[arg-type]
        return None
    first, second = (source(part) for part in node.args[0])  # type: ignore[union-attr]
    last = node.meta["val"].dim() - 1
    if first is not second or node.args[1:] not in ((-1,), (last,)) or node.meta["val"].dtype != torch.float32:
        return None
    by_target = {reader.target: reader for reader in readers(node)}
    if set(by_target) != {aten.cos.default, aten.sin.default} or len(readers(node)) != 2:
        return None
    ends = [_scaled_and_cast(by_target[target]) for target in (aten.cos.default, aten.sin.default)]
    (scaling, cos, of_cos), (sin_scaling, sin, of_sin) = ends
    if scaling != sin_scaling or cos.meta["val"].dtype != sin.meta["val"].dtype:
        return None
    return _Table(first, scaling, cos, sin, [node, *of_cos, *of_sin])


def _scaled_and_cast(node: Node) -> tuple[float, Node, list[Node]]:
    """Follow an optional multiplication by a number, then an optional cast.

    Returns:
        The number (1 without a multiplication), the last node, and all nodes from `node` to it.
    """
    inner, scaling = [node], 1.0
    follower = _only_reader(node)
    if follower is not None and follower.target is aten.mul.Tensor and isinstance(follower.args[1], (int, float)):
        scaling, node = float(follower.args[1]), follower
        inner.append(node)
        follower = _only_reader(node)
    if follower is not None and follower.target is aten.to.dtype and len(follower.args) == 2 and not follower.kwargs:
        node = follower
        inner.append(node)
    return scaling, node, inner


def _only_reader(node: Node) -> Node | None:
    found = readers(node)
    return found[0] if len(found) == 1 else None
