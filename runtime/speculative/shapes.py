"""Trees of one shape: chains, and trees with so many children a node at each depth.

The children are the draft's best tokens; where the target samples, those that it would sample with the same noise.

Shapes: B rows, N nodes, F nodes of a layer, V vocabulary.
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

#: Scores `[B, F, V]` of logits `[B, F, V]` at a depth, given `names` as in :class:`Steps`: the best is what the target
#: would sample there, had it these logits.
Sampled = Callable[[Tensor, int, Tensor | None], Tensor]


class Steps(Protocol):
    """What a grower asks of a draft.

    Attributes:
        names: int64 `[V]`: what to add to the draft's tokens for the target's; None where they are the same.
    """

    names: Tensor | None

    def step(self, tokens: Tensor, positions: Tensor, ancestors: Tensor, up: Tensor, first: int) -> Tensor:
        """Logits `[B, F, V]` of nodes in the draft's own tree, at its slots from `first` on.

        `up` int64 `[B, F]` are the places of their parents in the layer before.
        """


class TreeKind(Protocol):
    """Options of a kind of tree.

    Attributes:
        nodes: of the verified tree, the root included; a fixed number, and those that are not needed pad it.
        depth: the longest path.
    """

    @property
    def nodes(self) -> int: ...

    @property
    def depth(self) -> int: ...

    @property
    def steps(self) -> int:
        """Slots that the draft's own tree needs: the nodes whose children are asked for, without the root."""

    @property
    def widest(self) -> int:
        """Children of one node at most."""

    @property
    def catches_up(self) -> int:
        """Tokens that a draft catches up with in one call: what a round emits at most, or more where that makes the
        call one of a layer's shape."""

    def grower(self, rows: int, device: torch.device) -> Grower: ...


class Grower(Protocol):
    """Grows trees of one kind, for a number of rows, on one device."""

    def grow(self, draft: Steps, root: Tensor, position: Tensor, logits: Tensor, sampled: Sampled | None) -> TokenTree:
        """A tree below `root` int64 `[B]`, which stands at `position` int32 `[B]`; the draft's logits there `[B, V]`.

        `sampled` is given where the target samples.
        """


@dataclass(frozen=True)
class Static:
    """A tree of one shape.

    Attributes:
        widths: children of every node by depth: `(4, 2, 1)` are 4 + 8 + 8 nodes below the root.

    Raises:
        EffpassError: no width, one below 1, or more nodes than the mask has bits.
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
    """One path of `depth` tokens."""
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
        # The draft's tree holds the nodes without the root and without the last layer, so node i stands in slot i - 1.
        self.of_draft = pack(unpack(self.ancestors, kind.nodes)[:, :, 1:])
        self.up = self.parents - torch.tensor([max(0, parent) for parent in self._first_of_parents()], device=device)

    def _first_of_parents(self) -> list[int]:
        """For each node the first node of its parent's layer."""
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
            of = slice(layer.start, layer.stop)
            above = torch.where((positions[:, of] >= 0)[..., None], self.of_draft[:, of], 0)
            logits = draft.step(tokens[-1], positions[:, of].contiguous(), above, self.up[:, of], layer.start - 1)
        return TokenTree(torch.cat(tokens, 1), self.parents, positions, ancestors, kind.depth)
