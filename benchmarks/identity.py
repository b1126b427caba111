"""A pass that rewrites nothing but counts as a hit, so that the retraced graph is what runs."""

from __future__ import annotations

from collections.abc import Iterator

from effpass.core import registry
from effpass.core.pass_ import GraphPass, Match
from effpass.core.program import Program


class Identity(GraphPass):
    """Leaves the graph as it is."""

    name = "identity"
    exact = False  # it runs only where it is named

    def find(self, program: Program) -> Iterator[Match]:
        if program.parent is None:
            yield Match(next(iter(program.graph.nodes)), {})

    def rewrite(self, program: Program, match: Match) -> None:
        return None


def register() -> None:
    """Make it known by name in this process; importing it does not."""
    registry.BUILTIN.setdefault("identity", "benchmarks.identity:Identity")
