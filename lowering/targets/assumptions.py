"""Sizes that a compiler took for granted: found after it ran, since compiled code checks none of them when called.

Inductor may choose code by the sizes of the example it compiles for, and notes the condition as a guard.
`torch.compile` checks guards at each call; ahead-of-time compilation drops them. On GPUs it counts the elements of
small tensors with 32 bits: that they stay small is a guard too, and becomes a limit of the file.
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
from effpass.lowering.targets.decode_graph import sizes_stay_free
from effpass.lowering.targets.limits import LARGEST_INDEX, Elements

__all__ = ["any_size"]

# Sizes at which a condition must hold. 0 and 1 are left out: there a condition may be a mere order of equal strides,
# and the cases that every file is checked with (validation.py) have a batch, tokens and a past of 1, and a past of 0.
_PROBES = (2, 3, 5, 8, 64, 1000, 100_003)

# B, T and P.
_SIZES = sympy.symbols("batch tokens past", integer=True, nonnegative=True)


@contextmanager
def any_size(program: ExportedProgram, compiler: str) -> Iterator[list[Elements]]:
    """Compile `program` inside; raises when the code would be right for some sizes only.

    Args:
        program: a decode graph.
        compiler: its name, for messages.

    Yields:
        A list: afterwards it holds the tensors that the code counts through with 32 bits.

    Raises:
        ExportError: names the condition.
    """
    specs = program.graph_signature.user_inputs
    values = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in specs}
    ids, mask, positions, *past = (values[str(name)] for name in specs)
    environment = ids.fake_mode.shape_env
    known = len(environment.guards)
    counted: list[Elements] = []
    with sizes_stay_free():
        yield counted
    rows, new, held = _SIZES
    meanings: dict[sympy.Symbol, sympy.Expr] = {}
    for tensor, dims in [
        (ids, {0: rows, 1: new}),
        (positions, {0: rows, 1: new}),
        *((t, {0: rows, 2: held}) for t in past),
        (mask, {0: rows, 1: new + held}),  # a symbol of its own in some versions
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
    """The elements whose number `condition` holds below 2³¹; None for a condition of another kind.

    What the condition takes away from them is left out: the limit is a little narrower then.
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
    """Whether `one` is at least `other` at all sizes, term by term."""
    factors = {tuple(exponents): factor for factor, *exponents in one}
    return all(factors.get(tuple(exponents), 0) >= factor for factor, *exponents in other)


def _assumed(compiler: str, condition: Any) -> ExportError:
    return ExportError(
        f"{compiler} compiled the graph for sizes with {condition} only, and its code would not check that",
        hint="export to ONNX, or use torch.compile(backend='effpass')",
    )
