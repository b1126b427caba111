"""Inlines a plain PyTorch function into a program.

The function is traced on the fake values of its inputs in the program, so that the shapes and symbols of the new nodes
are right. Derived weights (:mod:`effpass.core.derived`) and replacements of patterns (:mod:`effpass.core.pattern`) are
inserted in this way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch._guards import TracingContext
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

if TYPE_CHECKING:
    from effpass.core.program import Program

__all__ = ["inline", "program_values"]


@contextmanager
def program_values(program: Program) -> Iterator[None]:
    """Make the fake mode and grad mode of `program` current, whatever is active around the caller."""
    fake_mode = program.fake_mode()
    context = TracingContext.try_get()
    outer = context.fake_mode if context is not None else None
    if context is not None:
        context.fake_mode = fake_mode
    try:
        with fake_mode, torch.set_grad_enabled(program.grad_enabled):
            yield
    finally:
        if context is not None:
            context.fake_mode = outer


def inline(program: Program, fn: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """Trace ``fn(*inputs)`` into the dialect and insert its nodes at the graph's current insertion point.

    Args:
        program: program to insert into, usually within ``with program.graph.inserting_before(node)``.
        fn: plain PyTorch function of tensors, SymInts and numbers; it must be out of place.
        inputs: arguments of `fn`: nodes of the program, or constants.

    Returns:
        The return value of `fn`, as nodes of the program with their values in ``meta["val"]``.

    Raises:
        ValueError: `fn` holds a tensor constant.
    """
    with program_values(program):
        values = [_fresh(a.meta["val"]) if isinstance(a, Node) else a for a in inputs]
        traced = make_fx(fn, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
    traced.graph.eliminate_dead_code()
    mapping: dict[Node, Any] = {}
    takes = [n for n in traced.graph.nodes if n.op == "placeholder"]
    for take, given in zip(takes, inputs, strict=True):
        mapping[take] = given
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            raise ValueError(f"the inlined function holds a tensor constant ({node.target}); pass tensors as inputs")
        if node.op == "call_function":
            mapping[node] = program.graph.node_copy(node, lambda n: mapping[n])
    (output,) = traced.graph.find_nodes(op="output")
    return torch.fx.node.map_arg(output.args[0], lambda n: mapping[n])


def _fresh(value: Any) -> Any:
    """A distinct tensor object with the same metadata.

    Two nodes may share one value object, which tracing would treat as a single input.
    """
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().requires_grad_() if value.requires_grad else value.detach()
