"""Removes the differences between the programs of the two front ends, so that passes need not handle them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from effpass.core.program import Program

__all__ = ["normalize"]

# torch.export inserts these checks between operators (20 in a two-layer Qwen3) and Dynamo does not; nothing reads them.
_CHECKS = (torch.ops.aten._assert_tensor_metadata.default,)


def normalize(program: Program) -> None:
    """Bring `program` and its bodies to the common form, in place."""
    for part in (program, *program.bodies):
        for node in list(part.graph.nodes):
            if node.op == "call_function" and node.target in _CHECKS:
                part.graph.erase_node(node)
        part.recompile()
