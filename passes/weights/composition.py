"""Two weights passes on one weight."""

from __future__ import annotations

from collections.abc import Collection

from effpass.core.errors import PassRefusedError
from effpass.core.program import Program

__all__ = ["check_first"]


def check_first(program: Program, names: Collection[str], pass_name: str) -> None:
    """Raise unless the weights `names` of `program` are still as the model has them.

    In a graph a weight is derived from the original once. The module home has no such limit: there each pass finds what
    the one before it left.

    Raises:
        PassRefusedError: another pass derives one of them already; names both passes and the weight.
    """
    for owner, _ in program.derived_nodes:
        other, _, name = owner.partition(":")
        if other != pass_name and name in names:
            raise PassRefusedError(
                f"{pass_name} and {other} both change {name}, which one graph can't do twice",
                hint="call effpass.prepare(model, recipe) before compiling: it changes the model itself, in turn",
            )
