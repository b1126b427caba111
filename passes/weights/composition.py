"""Check that two weights passes do not change the same weight of a graph."""

from __future__ import annotations

from collections.abc import Collection

from effpass.core.errors import PassRefusedError
from effpass.core.program import Program

__all__ = ["check_first"]


def check_first(program: Program, names: Collection[str], pass_name: str) -> None:
    """Check that no other pass has derived a weight from one of the weights `names` of `program`.

    In a graph, a weight can be derived from its original only once. :func:`effpass.prepare` has no such limit, because
    each pass changes the weights that the previous one has left in the model.

    Args:
        program: program that the pass is about to rewrite.
        names: names of the weights that the pass changes.
        pass_name: name of the pass.

    Raises:
        PassRefusedError: another pass already derives one of the weights; the message names both passes and the weight.
    """
    for owner, _ in program.derived_nodes:
        other, _, name = owner.partition(":")
        if other != pass_name and name in names:
            raise PassRefusedError(
                f"{pass_name} and {other} both change {name}, which one graph can't do twice",
                hint="call effpass.prepare(model, recipe) before compiling: it changes the model itself, in turn",
            )
