"""Static trees, which have a fixed number of children per node at each depth, and the interfaces of all tree kinds.

The children of a node are the draft's best tokens; if the target samples, the best ones after applying the noise that
the target samples with.

Shapes: B batch, N nodes, F nodes of a layer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import effpass.lowering.ops.top_tokens  # noqa: F401  (registers the operator)
from effpass.core.errors import EffpassError
from effpass.lowering.ops.ancestors import pack, relations, unpack
from effpass.lowering.ops.tree_growth import positions_at
from effpass.runtime.speculative.tree import TokenTree, check_tree

__all__ = ["Grower", "Sampled", "Static", "Steps", "TreeKind", "chain"]

#: Function from logits `[B, F, V]`, their depth and `names` of :class:`Steps` to scores `[B, F, V]`. The token with the
#: largest score is the one that the target would sample at that depth if it had these logits.
Sampled = Callable[[Tensor, int, Tensor | None], Tensor]


class Steps(Protocol):
    """Interface through which a grower runs a draft.

    Attributes:
        names: int64 `[V]`, offset from each token of the draft's vocabulary to the target's; None if they are the same.
    """

    names: Tensor | None

    def step(self, tokens: Tensor, positions: Tensor, ancestors: Tensor, up: Tensor, first: int) -> Tensor:
        """Run the draft on a layer of nodes and return their logits `[B, F, V]`.

        Args:
            tokens: int64 `[B, F]`, tokens of the nodes, in the target's vocabulary.
            positions: int32 `[B, F]`, their positions; -1 for padding.
            ancestors: int64 `[B, F, W]`, their ancestor masks over the slots of the draft's own tree.
            up: int64 `[B, F]`, index of each node's parent within the previous layer.
            first: slot of the draft's tree for the first of the nodes.
        """


class TreeKind(Protocol):
    """Interface of the options of a kind of tree.

    Attributes:
        nodes: number of nodes of the verified tree, including the root; smaller trees are padded to it.
        sizes: numbers of nodes to which a tree may be padded, ascending; the last one is `nodes`.
        depth: maximum depth of a node, 0 for the root.
    """

    @property
    def nodes(self) -> int: ...

    @property
    def sizes(self) -> tuple[int, ...]: ...

    @property
    def depth(self) -> int: ...

    @property
    def steps(self) -> int:
        """Number of slots of the draft's own tree, which holds the expanded nodes without the root."""

    @property
    def widest(self) -> int:
        """Maximum number of children of a node."""

    @property
    def catches_up(self) -> int:
        """Number of emitted tokens that a draft runs in one call.

        At least the maximum that a round emits; more if the call then has the same shape as that for a layer.
        """

    def grower(self, rows: int, device: torch.device) -> Grower: ...


class Grower(Protocol):
    """Interface of an object that grows trees of one kind, for one batch size and device."""

    def grow(self, draft: Steps, root: Tensor, position: Tensor, logits: Tensor, sampled: Sampled | None) -> TokenTree:
        """Grow a tree.

        Args:
            draft: draft that gives the logits of nodes.
            root: int64 `[B]`, token of the root.
            position: int32 `[B]`, position of the root; -1 for sequences without a tree.
            logits: `[B, V]`, logits of the draft at the root.
            sampled: scores to choose children by if the target samples; None to choose by logits.
        """


@dataclass(frozen=True)
class Static:
    """A tree of fixed shape.

    Attributes:
        widths: number of children of every node, by depth; `(4, 2, 1)` has 4 + 8 + 8 nodes below the root.

    Raises:
        EffpassError: if there are no widths, one is below 1, the tree is too deep, or it has more nodes than an
            ancestor mask has bits.
    """

    widths: tuple[int, ...] = (4, 2, 1, 1)

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise EffpassError(f"a static tree of widths {self.widths}", hint="give one or more numbers from 1 on")
        check_tree(self.nodes, self.depth)

    @property
    def depth(self) -> int:
        return len(self.widths)

    @property
    def nodes(self) -> int:
        return 1 + self._below(len(self.widths))

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.nodes,)

    @property
    def steps(self) -> int:
        return self._below(len(self.widths) - 1)

    @property
    def widest(self) -> int:
        return max(self.widths)

    @property
    def catches_up(self) -> int:
        return self.depth + 1

    def _below(self, depth: int) -> int:
        total, layer = 0, 1
        for width in self.widths[:depth]:
            layer *= width
            total += layer
        return total

    def grower(self, rows: int, device: torch.device) -> Grower:
        return _StaticGrower(self, rows, device)


def chain(depth: int = 5) -> Static:
    """Return the kind of trees that are a single path of `depth` tokens below the root."""
    return Static((1,) * depth)


class _StaticGrower:
    def __init__(self, kind: Static, rows: int, device: torch.device) -> None:
        parents, layers = [-1], [range(1)]
        for width in kind.widths:
            first = len(parents)
            parents += [parent for parent in layers[-1] for _ in range(width)]
            layers.append(range(first, len(parents)))
        self.kind, self.layers = kind, layers
        self.parents = torch.tensor([parents], device=device).expand(rows, -1)
        self.depths, self.ancestors = relations(self.parents, kind.depth)
        # The draft's tree holds the nodes without the root and without the last layer, so that node i is in slot i - 1.
        self.of_draft = pack(unpack(self.ancestors, kind.nodes)[:, :, 1:])
        self.up = self.parents - torch.tensor([max(0, parent) for parent in self._first_of_parents()], device=device)

    def _first_of_parents(self) -> list[int]:
        """Return, for each node, the first node of its parent's layer."""
        return [self.layers[max(0, depth - 1)].start for depth, layer in enumerate(self.layers) for _ in layer]

    def grow(self, draft: Steps, root: Tensor, position: Tensor, logits: Tensor, sampled: Sampled | None) -> TokenTree:
        kind, tokens = self.kind, [root[:, None]]
        positions = positions_at(position, self.depths)
        ancestors = torch.where((positions >= 0)[..., None], self.ancestors, 0)
        logits = logits[:, None]
        for depth, width in enumerate(kind.widths):
            scores = logits if sampled is None else sampled(logits, depth, draft.names)
            best = torch.ops.effpass.top_tokens(scores.flatten(0, 1), width)[1].view(len(root), -1)
            tokens.append(best if draft.names is None else best + draft.names[best])
            if depth + 1 == kind.depth:
                break
            layer = self.layers[depth + 1]
            span = slice(layer.start, layer.stop)
            above = torch.where((positions[:, span] >= 0)[..., None], self.of_draft[:, span], 0)
            logits = draft.step(tokens[-1], positions[:, span].contiguous(), above, self.up[:, span], layer.start - 1)
        return TokenTree(torch.cat(tokens, 1), self.parents, positions, ancestors, kind.depth)
