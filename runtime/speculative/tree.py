"""Token trees as tensors of fixed size.

Node 0 is the *root*: the last token that was emitted, which the target has not seen yet. The others are proposals. A
node stands behind its parent, so that every prefix of the nodes is a tree.

Shapes: B rows, N nodes, W words of 64 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from effpass.core.errors import EffpassError
from effpass.lowering.ops.ancestors import MOST_NODES

__all__ = ["MOST_DEPTH", "TokenTree", "check_tree"]

MOST_DEPTH = 60


@dataclass(frozen=True)
class TokenTree:
    """Trees of one size, one for each row.

    Attributes:
        tokens: int64 `[B, N]`.
        parents: int64 `[B, N]`; -1 for the root, and for nodes that only pad the tree.
        positions: int32 `[B, N]`; -1 for padding, and in rows that have ended.
        ancestors: int64 `[B, N, W]`: see :mod:`effpass.lowering.ops.ancestors`.
        depth: the largest depth there can be.
    """

    tokens: Tensor
    parents: Tensor
    positions: Tensor
    ancestors: Tensor
    depth: int


def check_tree(nodes: int, depth: int) -> None:
    """Raise an :class:`EffpassError` for a tree that is larger than the mask of ancestors, or too deep."""
    if depth > MOST_DEPTH:
        raise EffpassError(f"a tree of depth {depth}", hint=f"give {MOST_DEPTH} or less")
    if nodes > MOST_NODES:
        raise EffpassError(
            f"a tree of {nodes} nodes is larger than the mask of ancestors, which has {MOST_NODES} bits",
            hint=f"give {MOST_NODES} nodes or fewer",
        )
