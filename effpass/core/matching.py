"""Matches a traced pattern against a program by backtracking, and finds the reason when it does not fit.

:mod:`effpass.core.pattern` traces the patterns and defines what matches; this module implements the search. An
:class:`Attempt` tries one pattern at one node.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effpass.core.verify import snapshot

if TYPE_CHECKING:
    from effpass.core.program import Program

__all__ = ["Attempt", "Miss", "Pattern", "Surroundings", "is_noop_cast", "is_size", "writes"]

aten = torch.ops.aten

_COMMUTATIVE = (aten.add.Tensor, aten.mul.Tensor)
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default)
_READS_A_VALUE = (aten.item.default, aten._local_scalar_dense.default)
_BORDERS = (
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
)


@dataclass(frozen=True)
class Pattern:
    """A traced pattern.

    Attributes:
        arguments: argument name → placeholder.
        anchor: node of the result, the last one of the pattern.
        size: number of operators.
    """

    arguments: dict[str, Node]
    anchor: Node
    size: int


def is_size(node: Node) -> bool:
    """Whether the value of `node` is a number that is computed from sizes."""
    number = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    return isinstance(node.meta.get("val"), number) and node.target not in _READS_A_VALUE


def is_noop_cast(node: Node) -> bool:
    """Whether `node` casts a tensor to the dtype and device that it already has, and thus returns the same tensor."""
    if node.target not in _CASTS:
        return False
    named = {a.name: value for a, value in zip(node.target._schema.arguments, _arguments(node), strict=True)}  # type: ignore[union-attr]
    before, after = node.all_input_nodes[0].meta["val"], node.meta["val"]
    same = before.dtype == after.dtype and before.device == after.device
    return same and not named.get("copy") and named.get("memory_format") is None


def writes(node: Node) -> bool:
    """Whether `node` is an operator that writes to one of its operands."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


@dataclass(frozen=True)
class Surroundings:
    """Properties of a program that a match must preserve.

    Attributes:
        position: node → position in the graph.
        epochs: reader → storage root → number of earlier writes, as in :class:`effpass.core.verify.Snapshot`.
        writes: storage root → positions of the nodes that write to it, in order.
        borders: nodes that begin or end a no-grad or autocast region.
    """

    position: dict[Node, int]
    epochs: dict[Node, dict[Node, int]]
    writes: dict[Node, list[int]]
    borders: list[Node]

    @classmethod
    def of(cls, program: Program) -> Surroundings:
        position = {node: i for i, node in enumerate(program.graph.nodes)}
        order = snapshot(program)
        writes = {root: [position[node] for node in nodes] for root, nodes in order.writes.items()}
        return cls(position, order.epochs, writes, [node for node in position if node.target in _BORDERS])

    def why_not_late(self, inner: set[Node], anchor: Node) -> str | None:
        """Why the nodes `inner` can't be computed as late as `anchor`; None when they can."""
        last = self.position[anchor]
        for node in inner:
            for root, seen in self.epochs.get(node, {}).items():
                if any(at < last for at in self.writes[root][seen:]):
                    return f"{root.name} is written between its read by {node.name} and {anchor.name}"
        first = min(self.position[node] for node in inner)
        for border in self.borders:
            if first < self.position[border] < last:
                return f"{border.name} lies inside: a border of no_grad or autocast"
        return None


@dataclass(frozen=True)
class _Bound:
    """A partial or complete assignment of a pattern to a program.

    Attributes:
        nodes: node of the pattern → node or number of the program.
        sizes: pairs of a number in the pattern and its counterpart in the program. They are compared when everything
            else is bound.
    """

    nodes: dict[Node, Any] = field(default_factory=dict)
    sizes: tuple[tuple[Node, Any], ...] = ()

    @property
    def inner(self) -> set[Node]:
        return {found for pattern, found in self.nodes.items() if pattern.op != "placeholder"}


@dataclass(frozen=True)
class Miss:
    """Why an attempt failed.

    Attributes:
        anchor: node of the program at which the pattern was tried.
        fitting: number of operators that fit.
        reason: description of the mismatch.
        is_complete: whether all operators fit, so that the place has the pattern but must not be rewritten.
    """

    anchor: Node
    fitting: int
    reason: str
    is_complete: bool = False


class Attempt:
    """An attempt to match a pattern so that its last node is `anchor`.

    Args:
        pattern: traced pattern.
        anchor: node of the program.
        surroundings: properties of the program that a match must preserve.
        taken: nodes inside earlier matches → anchor of the match.

    Attributes:
        bound: assignment of the pattern; None if it does not match.
        miss: reason why it does not match; of all assignments tried, that of the one where most operators fit.
    """

    def __init__(self, pattern: Pattern, anchor: Node, surroundings: Surroundings, taken: dict[Node, Node]) -> None:
        self.pattern = pattern
        self.anchor = anchor
        self.bound: _Bound | None = None
        self.miss = Miss(anchor, 0, "another operator")
        for bound in self._bind(pattern.anchor, anchor, _Bound()):
            reason = self._refusal(bound, surroundings, taken)
            if reason is None:
                self.bound = bound
                return
            self.miss = Miss(anchor, pattern.size, reason, is_complete=True)

    def _refusal(self, bound: _Bound, surroundings: Surroundings, taken: dict[Node, Node]) -> str | None:
        """Why an assignment in which all operators fit is not a match; None when it is one."""
        inner = bound.inner
        for size, found in bound.sizes:
            expected = _evaluate(size, bound)
            if not _equal_numbers(expected, _value(found)):
                return f"{_value(found)} where the pattern has {expected} ({size.format_node()})"
        for node in inner:
            if node in taken:
                return f"overlaps the match at {taken[node].name}"
        for node in inner - {self.anchor}:
            for user in node.users:
                passing = is_size(user) or is_noop_cast(user)
                if user not in inner and not (passing and inner.issuperset(user.users)):
                    return f"its inner value {node.name} is also read by {user.name}"
        return surroundings.why_not_late(inner, self.anchor)

    def _bind(self, pattern: Any, found: Any, bound: _Bound) -> Iterator[_Bound]:
        """Yield all ways to assign `pattern` (a node, a literal or a list) to `found` that extend `bound`."""
        while isinstance(found, Node) and is_noop_cast(found):  # skip casts without effect; a pattern has none
            found = found.all_input_nodes[0]
        if isinstance(pattern, (list, tuple)):
            if isinstance(found, (list, tuple)) and len(found) == len(pattern):
                yield from self._bind_all(list(zip(pattern, found, strict=True)), bound)
            else:
                self._fail(bound, f"{found} where the pattern has {pattern}")
        elif not isinstance(pattern, Node):
            if type(pattern) is type(found) and pattern == found:
                yield bound
            else:
                self._fail(bound, f"{found} where the pattern has {pattern}")
        elif is_size(pattern):
            if isinstance(_value(found), (int, float, torch.SymInt, torch.SymFloat)):
                yield _Bound(bound.nodes, (*bound.sizes, (pattern, found)))
            else:
                self._fail(bound, f"{found} where the pattern has a size")
        elif pattern in bound.nodes:
            if bound.nodes[pattern] is found or (not isinstance(found, Node) and bound.nodes[pattern] == found):
                yield bound
            else:
                self._fail(bound, f"{found} where the pattern reads {bound.nodes[pattern]} again")
        elif pattern.op == "placeholder":
            value, expected = _value(found), pattern.meta["val"]
            if not isinstance(value, (torch.Tensor, int, float, torch.SymInt, torch.SymFloat)):
                self._fail(bound, f"{found} where the pattern has a tensor")
            elif isinstance(value, torch.Tensor) and expected.is_floating_point() and value.dtype != expected.dtype:
                self._fail(bound, f"{found} is {value.dtype} where the pattern has {expected.dtype}")
            else:
                yield _Bound({**bound.nodes, pattern: found}, bound.sizes)
        else:
            yield from self._bind_operator(pattern, found, bound)

    def _bind_operator(self, pattern: Node, found: Any, bound: _Bound) -> Iterator[_Bound]:
        if not isinstance(found, Node) or found.target != pattern.target:
            what = (
                f"{found} = {found.target}" if isinstance(found, Node) and found.op == "call_function" else str(found)
            )
            self._fail(bound, f"{what} where the pattern has {pattern.target}")
            return
        if found in bound.inner:
            self._fail(bound, f"{found} stands for two values of the pattern")
            return
        bound = _Bound({**bound.nodes, pattern: found}, bound.sizes)
        expected, given = _arguments(pattern), _arguments(found)
        yield from self._bind_all(_operators_first(expected, given), bound)
        if pattern.target in _COMMUTATIVE and given[2:] in ([], [1]):  # alpha scales the second operand
            yield from self._bind_all(_operators_first(expected, [given[1], given[0], *given[2:]]), bound)

    def _bind_all(self, pairs: list[tuple[Any, Any]], bound: _Bound) -> Iterator[_Bound]:
        if not pairs:
            yield bound
            return
        for first in self._bind(*pairs[0], bound):
            yield from self._bind_all(pairs[1:], first)

    def _fail(self, bound: _Bound, reason: str) -> None:
        fitting = len(bound.inner)
        if fitting > self.miss.fitting:
            complete = fitting == self.pattern.size
            reason = reason if complete else f"{fitting} of the pattern's {self.pattern.size} operators fit; {reason}"
            self.miss = Miss(self.anchor, fitting, reason, complete)


def _operators_first(patterns: list[Any], found: list[Any]) -> list[tuple[Any, Any]]:
    """Pairs in the order in which to bind them: operators first, so that a miss reports the deepest mismatch."""
    pairs = zip(patterns, found, strict=True)
    return sorted(
        pairs, key=lambda pair: not isinstance(pair[0], Node) or pair[0].op == "placeholder" or is_size(pair[0])
    )


def _arguments(node: Node) -> list[Any]:
    """The arguments of a node in the order of the operator's schema, including defaults."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return [*node.args, *node.kwargs.values()]
    arguments = []
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            arguments.append(node.args[i])
        else:
            arguments.append(node.kwargs.get(argument.name, argument.default_value))
    return arguments


def _value(found: Any) -> Any:
    return found.meta.get("val") if isinstance(found, Node) else found


def _evaluate(pattern: Any, bound: _Bound) -> Any:
    """The value in the program of a size of the pattern."""
    if not isinstance(pattern, Node):
        return pattern
    if pattern in bound.nodes:
        return _value(bound.nodes[pattern])
    return pattern.target(*[_evaluate(a, bound) for a in pattern.args])  # type: ignore[operator]


def _equal_numbers(a: Any, b: Any) -> bool:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-12)  # d ** -0.5 and 1 / sqrt(d) differ in the last bit
    return statically_known_true(a == b)
