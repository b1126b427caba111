"""Sizes that a compiler took for granted: found after it ran, since compiled code checks none of them when called.

Inductor may choose code by the sizes of the example it compiles for, and notes the condition as a guard.
`torch.compile` checks guards at each call; ahead-of-time compilation drops them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram

from effpass.core.errors import ExportError
from effpass.lowering.targets.decode_graph import sizes_stay_free

__all__ = ["any_size"]

# Sizes at which a condition must hold. 0 and 1 are left out: there a condition may be a mere order of equal strides,
# and the cases that every file is checked with (validation.py) have a batch, tokens and a past of 1, and a past of 0.
_PROBES = (2, 3, 5, 8, 64, 1000, 100_003)


@contextmanager
def any_size(program: ExportedProgram, compiler: str) -> Iterator[None]:
    """Compile `program` inside; raises when the code would be right for some sizes only.

    Args:
        program: a decode graph.
        compiler: its name, for messages.

    Raises:
        ExportError: names the condition.
    """
    specs = program.graph_signature.user_inputs
    values = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in specs}
    ids, mask, positions, *past = (values[str(name)] for name in specs)
    environment = ids.fake_mode.shape_env
    known = len(environment.guards)
    with sizes_stay_free():
        yield
    roles: dict[Any, int] = {}
    for tensor, dims in [
        (ids, {0: 0, 1: 1}),
        (mask, {0: 0}),
        (positions, {0: 0, 1: 1}),
        *((t, {0: 0, 2: 2}) for t in past),
    ]:
        for dim, role in dims.items():
            size = tensor.shape[dim]
            if isinstance(size, torch.SymInt):
                roles[size.node._expr] = roles[size.node.expr] = role
    for guard in environment.guards[known:]:
        condition = guard.expr
        if not condition.free_symbols <= roles.keys():
            raise _assumed(compiler, condition)
        for sizes in itertools.product(_PROBES, repeat=3):
            if not condition.subs({symbol: sizes[roles[symbol]] for symbol in condition.free_symbols}):
                raise _assumed(compiler, condition)


def _assumed(compiler: str, condition: Any) -> ExportError:
    return ExportError(
        f"{compiler} compiled the graph for sizes with {condition} only, and its code would not check that",
        hint="export to ONNX, or use torch.compile(backend='effpass')",
    )
