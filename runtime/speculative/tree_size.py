"""The size to which the next trees are padded, from the sizes that the latest ones had.

A round is a CUDA graph of fixed shapes. C2T's trees have as many nodes as the classifier keeps, so that there is one
graph for each of a few sizes. The host queues rounds ahead, and chooses by trees of a few rounds before. If a tree has
more nodes than the chosen size, its last ones are dropped, which costs accepted tokens but changes no text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

__all__ = ["LATEST", "TreeSize"]

LATEST = 8  # number of trees that the next one is expected to be no larger than


class TreeSize:
    """Chooses among sizes.

    Args:
        sizes: numbers of nodes, ascending.

    Attributes:
        varies: whether there is a choice.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = tuple(sizes)
        self._latest: deque[int] = deque(maxlen=LATEST)
        self.varies = len(self._sizes) > 1

    @property
    def nodes(self) -> int:
        """The smallest size that holds the latest trees; the largest one until there are enough of them."""
        if len(self._latest) < LATEST:
            return self._sizes[-1]
        return self._at_least(max(self._latest))

    def saw(self, nodes: int, largest: int) -> None:
        """Record a round.

        Args:
            nodes: size of its trees.
            largest: number of nodes of the largest tree of the batch, with the root. A full one may have lost nodes,
                and counts as the next larger size.
        """
        self._latest.append(largest if largest < nodes else self._at_least(nodes + 1))

    def _at_least(self, nodes: int) -> int:
        return next((size for size in self._sizes if size >= nodes), self._sizes[-1])
