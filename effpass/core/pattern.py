"""Patterns written as plain PyTorch: trace, match, say why a match failed, inline the replacement."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.utils.matcher_utils import SubgraphMatcher

from effpass.core.pass_ import Match

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from effpass.core.pass_ import Pass
    from effpass.core.program import Program
    from effpass.core.report import Refusal

__all__ = ["find_pattern", "inline_replacement"]


def trace(fn: Callable[..., object], example_inputs: object) -> torch.fx.GraphModule:
    """Trace a plain PyTorch function into the dialect, with the sizes of `example_inputs` left symbolic."""
    gm = make_fx(fn, tracing_mode="symbolic", pre_dispatch=True)(*example_inputs)  # type: ignore[misc]
    gm.graph.eliminate_dead_code()
    return gm


def find_pattern(pass_: Pass, program: Program) -> Iterator[Match | Refusal]:
    """Yield a :class:`Match` for every place that computes ``pass_.pattern``.

    Interior values of a match must have no other reader: such a place is not a match, since its value is still needed.
    """
    pattern = trace(pass_.pattern, pass_.example_inputs())
    matcher = SubgraphMatcher(
        pattern.graph, match_output=False, match_placeholder=False, remove_overlapping_matches=True
    )
    for found in matcher.match(program.graph):
        (anchor,) = found.returning_nodes
        yield Match(anchor, {"inputs": list(found.placeholder_nodes), "literals": found.other_inputs})


def inline_replacement(pass_: Pass, program: Program, match: Match) -> None:
    """Put ``pass_.replacement`` in place of a match, with fake values for the new nodes."""
    replacement = trace(pass_.replacement, pass_.example_inputs())
    inputs = iter(match.nodes["inputs"])
    values = {node: next(inputs) for node in replacement.graph.nodes if node.op == "placeholder"}
    with program.graph.inserting_before(match.anchor):
        new = program.graph.graph_copy(replacement.graph, values)
    if new is None or not hasattr(new, "replace_all_uses_with"):
        raise TypeError(f"{pass_.name}: replacement must return one tensor, got {new!r}")
    program.refresh_values()
    match.anchor.replace_all_uses_with(new)
    program.graph.erase_node(match.anchor)
