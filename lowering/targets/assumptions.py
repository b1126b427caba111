"""Detection of the assumptions on sizes that Inductor makes while it compiles a decode graph.

Inductor may specialize code for the sizes of the example that it compiles with, and records the condition as a guard.
`torch.compile` checks guards at each call, but ahead-of-time compilation drops them, and the compiled code does not
check them either. :func:`any_size` therefore inspects the guards after compilation and refuses code that is correct for
some sizes only. One kind of guard is accepted: on GPUs Inductor indexes tensors with 32 bits where they are small, and
the guard that they stay small becomes a limit of the file (:class:`~effpass.lowering.targets.limits.Limits`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram

from effpass.core.errors import ExportError
from effpass.lowering.targets.limits import LARGEST_INDEX, Elements
from effpass.lowering.targets.tracing import sizes_stay_free

__all__ = ["any_size"]

# Sizes at which a condition must hold. 0 and 1 are left out: at these sizes a condition may only be about the order of
# equal strides, which does not matter, and the cases that every file is checked with (validation.py) include a batch,
# a token count and a past of 1, and a past of 0.
_PROBES = (2, 3, 5, 8, 64, 1000, 100_003)

# The sizes B, T and P of a decode graph.
_SIZES = sympy.symbols("batch tokens past", integer=True, nonnegative=True)


@contextmanager
def any_size(program: ExportedProgram, compiler: str) -> Iterator[list[Elements]]:
    """Context manager in which `program` is compiled; on exit it raises if the code is correct for some sizes only.

    Args:
        program: a decode graph.
        compiler: name of the compiler, for messages.

    Yields:
        A list that holds, after the context was left, the sizes of the tensors that the code indexes with 32 bits.

    Raises:
        ExportError: if the compiler made another assumption on sizes; the message names the condition.
    """
    specs = program.graph_signature.user_inputs
    values = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in specs}
    ids, mask, positions, *past = (values[str(name)] for name in specs)
    environment = ids.fake_mode.shape_env
    known = len(environment.guards)
    counted: list[Elements] = []
    with sizes_stay_free():
        yield counted
    batch, tokens, past_length = _SIZES
    meanings: dict[sympy.Symbol, sympy.Expr] = {}
    for tensor, dims in [
        (ids, {0: batch, 1: tokens}),
        (positions, {0: batch, 1: tokens}),
        *((t, {0: batch, 2: past_length}) for t in past),
        (mask, {0: batch, 1: tokens + past_length}),  # some versions of torch give it a symbol of its own
    ]:
        for dim, meaning in dims.items():
            size = tensor.shape[dim]
            if isinstance(size, torch.SymInt):
                for name in (size.node._expr, size.node.expr):
                    if isinstance(name, sympy.Symbol):
                        meanings.setdefault(name, meaning)
    for guard in environment.guards[known:]:
        condition = guard.expr.xreplace(meanings)
        if not condition.free_symbols <= set(_SIZES):
            raise _assumed(compiler, guard.expr)
        if (elements := _counted(condition)) is not None:
            if not any(_covers(other, elements) for other in counted):
                counted[:] = [*(other for other in counted if not _covers(elements, other)), elements]
            continue
        for sizes in itertools.product(_PROBES, repeat=3):
            if not condition.subs(dict(zip(_SIZES, sizes, strict=True))):
                raise _assumed(compiler, guard.expr)


def _counted(condition: Any) -> Elements | None:
    """Return the size of a tensor that `condition` bounds to 32-bit indices; None for any other condition.

    Negative terms of the size are dropped, which makes the limit slightly stricter than the condition.
    """
    if not isinstance(condition, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
        return None
    difference = sympy.expand(condition.lts - condition.gts)
    if not difference.is_polynomial(*_SIZES):
        return None
    factors: dict[tuple[int, int, int], int] = {}
    for (b, t, p), factor in sympy.Poly(difference, *_SIZES).terms():
        factors[b, t, p] = int(sympy.ceiling(factor))
    allowed = -factors.pop((0, 0, 0), 0) - isinstance(condition, (sympy.Lt, sympy.Gt))
    if allowed <= 2**30:
        return None
    factors[0, 0, 0] = max(0, LARGEST_INDEX - allowed)
    return tuple((factor, *place) for place, factor in factors.items() if factor > 0)


def _covers(one: Elements, other: Elements) -> bool:
    """Whether no coefficient of `one` is below that of `other`, so that `one` is at least as large at all sizes."""
    factors = {tuple(exponents): factor for factor, *exponents in one}
    return all(factors.get(tuple(exponents), 0) >= factor for factor, *exponents in other)


def _assumed(compiler: str, condition: Any) -> ExportError:
    return ExportError(
        f"{compiler} compiled the graph for sizes with {condition} only, and its code would not check that",
        hint="export to ONNX, or use torch.compile(backend='effpass')",
    )
