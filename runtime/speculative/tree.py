"""Token trees as tensors of fixed size.

Node 0 is the *root*, the last emitted token, which the target has not run yet. The other nodes are proposed tokens.
Parents precede their children, so that every prefix of the list of nodes is a tree.

Shapes: B batch, N nodes, W words of 64 bits.
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
    """A batch of trees of equal size, one for each sequence.

    Attributes:
        tokens: int64 `[B, N]`, token of each node.
        parents: int64 `[B, N]`, parent of each node; -1 for the root and for nodes that only pad the tree.
        positions: int32 `[B, N]`, position of each node's token; -1 for padding and for sequences that have ended.
        ancestors: int64 `[B, N, W]`, ancestor masks (:mod:`effpass.lowering.ops.ancestors`).
        depth: maximum depth of a node.
    """

    tokens: Tensor
    parents: Tensor
    positions: Tensor
    ancestors: Tensor
    depth: int

    def first(self, nodes: int) -> TokenTree:
        """Return the trees of the first `nodes` nodes."""
        if nodes >= self.tokens.shape[1]:
            return self
        tokens, parents, positions = (x[:, :nodes].contiguous() for x in (self.tokens, self.parents, self.positions))
        return TokenTree(tokens, parents, positions, self.ancestors[:, :nodes].contiguous(), self.depth)


def check_tree(nodes: int, depth: int) -> None:
    """Raise an :class:`EffpassError` for a tree that has more nodes than an ancestor mask has bits, or is too deep."""
    if depth > MOST_DEPTH:
        raise EffpassError(f"a tree of depth {depth}", hint=f"give {MOST_DEPTH} or less")
    if nodes > MOST_NODES:
        raise EffpassError(
            f"a tree of {nodes} nodes is larger than the mask of ancestors, which has {MOST_NODES} bits",
            hint=f"give {MOST_NODES} nodes or fewer",
        )
