"""Dynamic trees, whose shape depends on the confidence of the draft.

*eagle2* (https://arxiv.org/abs/2406.16858): the confidence of a node is the product of the draft's probabilities on its
path. The `top_k` nodes of a layer with the largest confidence are expanded, and the best nodes of all layers are
verified.

*c2t* (https://arxiv.org/abs/2502.13652, algorithm 1): a classifier with three inputs estimates the probability that the
target accepts a node. Nodes below β are dropped at once, and the best `top_k` of the rest of a layer are kept and
expanded.

A tree is computed from the draft's logits in tensors of fixed shape, without synchronization with the device. The
operators that grow a layer and choose the best nodes are in :mod:`effpass.lowering.ops.tree_growth`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import effpass.lowering.ops.top_tokens
import effpass.lowering.ops.tree_growth  # noqa: F401  (registers the operators)
from effpass.core.errors import EffpassError
from effpass.lowering.ops.ancestors import MOST_NODES, WORD
from effpass.runtime.speculative.classifier import Classifier
from effpass.runtime.speculative.shapes import Grower, Sampled, Steps
from effpass.runtime.speculative.tree import MOST_DEPTH, TokenTree, check_tree

__all__ = ["C2T", "Eagle2", "Growing"]

_LEAST_BITS = 3  # trees are padded to 8 nodes or more


@dataclass(frozen=True)
class Eagle2:
    """EAGLE-2 trees, which consist of the draft's most probable nodes.

    Attributes:
        top_k: number of children per node, and of nodes of a layer that are expanded.
        depth: number of layers below the root.
        nodes: number of nodes that are verified, including the root.

    Raises:
        EffpassError: if a number is too small, the tree is too deep, or it has more nodes than an ancestor mask has
            bits.
    """

    top_k: int = 8
    depth: int = 5
    nodes: int = 32

    def __post_init__(self) -> None:
        _check(self)

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.nodes,)

    @property
    def steps(self) -> int:
        return self.top_k * (self.depth - 1)

    @property
    def widest(self) -> int:
        return self.top_k

    @property
    def catches_up(self) -> int:
        return max(self.depth + 1, min(self.top_k, MOST_DEPTH))

    def grower(self, rows: int, device: torch.device) -> Grower:
        return Growing(self, rows, device, least=0.0, keeps_all=True)


@dataclass(frozen=True)
class C2T:
    """C2T trees, which consist of nodes that a classifier expects the target to accept.

    Attributes:
        classifier: classifier that was trained for the draft.
        beta: threshold β on the confidence of a node, below which it is dropped.
        top_k: number of children per node that the classifier evaluates, and maximum number of nodes kept per layer.
        depth: number of layers below the root.
        nodes: maximum number of nodes that are verified, including the root.

    Raises:
        EffpassError: if a number is out of range, the tree is too deep, or it has more nodes than an ancestor mask has
            bits.
    """

    classifier: Classifier
    beta: float = 0.5
    top_k: int = 8
    depth: int = 5
    nodes: int = 32

    def __post_init__(self) -> None:
        _check(self)
        if not 0 <= self.beta <= 1:
            raise EffpassError(f"beta of a tree is {self.beta}", hint="it is a confidence: give 0 to 1")

    @property
    def sizes(self) -> tuple[int, ...]:
        powers = (1 << bits for bits in range(_LEAST_BITS, MOST_NODES.bit_length()))
        return (*(size for size in powers if size < self.nodes), self.nodes)

    @property
    def steps(self) -> int:
        return self.top_k * (self.depth - 1)

    @property
    def widest(self) -> int:
        return self.top_k

    @property
    def catches_up(self) -> int:
        return max(self.depth + 1, min(self.top_k, MOST_DEPTH))

    def grower(self, rows: int, device: torch.device) -> Grower:
        weights = self.classifier.weights(device)
        return Growing(self, rows, device, least=self.beta, keeps_all=False, classifier=weights)


class Growing:
    """Grows trees layer by layer, from the draft's logits at the *frontier*, the expanded nodes of the last layer.

    Args:
        kind: sizes of the tree.
        rows: batch size B.
        device: device of the buffers.
        least: smallest confidence of a node that is not dropped.
        keeps_all: whether nodes that are not expanded may be verified too.
        classifier: weights of the classifier, as :meth:`Classifier.weights` returns them; None for EAGLE-2.

    Attributes:
        pool_tokens, pool_worth, pool_parents: `[B, P]`, candidates from which the nodes of the last tree were chosen.
        entropies: list to which the entropies `[B, F]` of each layer's frontier are appended; None to drop them.
        operators: namespace of the operators, which tests replace by kernels.
    """

    def __init__(
        self,
        kind: Eagle2 | C2T,
        rows: int,
        device: torch.device,
        *,
        least: float,
        keeps_all: bool,
        classifier: list[Tensor] | None = None,
    ) -> None:
        k, self.kind, self.least, self.keeps_all = kind.top_k, kind, least, keeps_all
        self.classifier = classifier or []
        of_layer = k * k if keeps_all else k
        size = (rows, k + (kind.depth - 1) * of_layer)
        self.pool_tokens = torch.zeros(size, dtype=torch.long, device=device)
        self.pool_worth = torch.zeros(size, device=device)
        self.pool_parents = torch.zeros_like(self.pool_tokens)
        self.entropies: list[Tensor] | None = None
        self.operators: Any = torch.ops.effpass
        self._one = torch.ones(rows, 1, device=device)
        self._root = torch.full((rows, 1), -1, dtype=torch.long, device=device)
        self._alone = torch.zeros(rows, 1, -(-k * kind.depth // WORD), dtype=torch.long, device=device)

    def grow(self, draft: Steps, root: Tensor, position: Tensor, logits: Tensor, sampled: Sampled | None) -> TokenTree:
        kind, k, first = self.kind, self.kind.top_k, 0
        path, worth, number, ancestors = self._one, self._one, self._root, self._alone
        pool = self.pool_tokens, self.pool_worth, self.pool_parents
        logits = logits[:, None]
        for depth in range(kind.depth):
            frontier = logits.shape[:2]
            found = self.operators.top_tokens(logits.flatten(0, 1), k)
            log_p, best, entropy = (x.view(*frontier, *x.shape[1:]) for x in found)
            if self.entropies is not None:
                self.entropies.append(entropy)
            tokens, positions, ancestors, up, path, worth, number = self.operators.grow_layer(
                log_p, best, entropy, path, worth, number, ancestors, position, draft.names, self.classifier, *pool,
                first, depth, self.least, self.keeps_all,
            )  # fmt: skip
            first += frontier[1] * k if self.keeps_all else k
            if depth + 1 < kind.depth:
                logits = draft.step(tokens, positions, ancestors, up, depth * k)
        chosen, parents, positions, ancestors = self.operators.best_nodes(root, position, *pool, kind.nodes, kind.depth)
        return TokenTree(chosen, parents, positions, ancestors, kind.depth)


def _check(kind: Eagle2 | C2T) -> None:
    for name in ("top_k", "depth", "nodes"):
        least = 2 if name == "nodes" else 1
        if getattr(kind, name) < least:
            raise EffpassError(f"{name} of a tree is {getattr(kind, name)}", hint=f"give {least} or more")
    check_tree(kind.nodes, kind.depth)
    if kind.top_k * kind.depth > MOST_NODES:
        raise EffpassError(
            f"{kind.depth} layers of {kind.top_k} nodes are more than the mask of ancestors holds, which has"
            f" {MOST_NODES} bits",
            hint="lower top_k or depth",
        )
