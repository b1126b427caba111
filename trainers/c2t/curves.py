"""How many tokens a tree gives for how many nodes, of trees that were collected.

    EAGLE-2 verifies the n most probable candidates, C2T those of a confidence of β at least, up to n of them

A tree emits one token more than it has accepted nodes. C2T is counted on the candidates that EAGLE-2 expanded; grown by
C2T itself, a tree has others too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from effpass.runtime.speculative.classifier import Classifier
from effpass.trainers.c2t.trees import Trees

__all__ = ["Point", "Sizes", "by_confidence", "by_probability", "choose", "saved"]

BETAS = tuple(round(0.05 * i, 2) for i in range(1, 20))
_SLACK = 0.005  # share of the tokens that a larger β may cost


@dataclass(frozen=True)
class Point:
    """
    Attributes:
        nodes: verified ones a tree, without the root.
        tokens: emitted ones a tree.
    """

    nodes: float
    tokens: float


def by_probability(trees: Trees, sizes: Sequence[int]) -> list[Point]:
    """EAGLE-2's curve: `sizes` nodes, the most probable."""
    rank = _rank(trees.probability)
    return [_point(trees, rank < size) for size in sizes]


def by_confidence(trees: Trees, classifier: Classifier, betas: Sequence[float], most: int = 1 << 30) -> list[Point]:
    """C2T's curve: nodes of a confidence of β at least, the `most` best of them."""
    worth = _worth(trees, classifier)
    rank = _rank(worth)
    return [_point(trees, (worth >= beta) & (rank < most)) for beta in betas]


def saved(trees: Trees, classifier: Classifier, betas: Sequence[float] = BETAS) -> dict[float, float]:
    """By β, the share of verified nodes that C2T saves over EAGLE-2 at the same tokens a tree.

    EAGLE-2's nodes are interpolated on its curve; a β of more tokens than the curve has, or of none, is left out.
    """
    sizes = [*range(1, 33), *range(36, 257, 4)]
    curve = by_probability(trees, [size for size in sizes if size <= trees.probability.shape[1]])
    tokens, nodes = np.array([p.tokens for p in curve]), np.array([p.nodes for p in curve])
    found = {}
    for beta, point in zip(betas, by_confidence(trees, classifier, betas), strict=True):
        if tokens[0] <= point.tokens <= tokens[-1]:
            found[beta] = 1 - point.nodes / float(np.interp(point.tokens, tokens, nodes))
    return found


@dataclass(frozen=True)
class Sizes:
    """What a tree on one device is best given.

    Attributes:
        nodes: verified ones, the root included.
        beta: β.
        rate: tokens a second.
    """

    nodes: int
    beta: float
    rate: float


def choose(trees: Trees, classifier: Classifier, seconds: Mapping[int, float]) -> Sizes:
    """The number of nodes with the most tokens a second, and the largest β that costs next to none of them.

    Args:
        seconds: of a round, by nodes with the root.
    """
    best: Sizes | None = None
    for nodes, time in seconds.items():
        points = by_confidence(trees, classifier, (0.0, *BETAS), nodes - 1)
        least = points[0].tokens * (1 - _SLACK)
        beta = max(b for b, p in zip((0.0, *BETAS), points, strict=True) if p.tokens >= least)
        rate = points[0].tokens / time
        if best is None or rate > best.rate:
            best = Sizes(nodes, beta, rate)
    assert best is not None
    return best


def _worth(trees: Trees, classifier: Classifier) -> Tensor:
    with torch.no_grad():
        return trees.along_paths(classifier(trees.features()).sigmoid())


def _rank(values: Tensor) -> Tensor:
    """Places `[N, P]` of candidates in their tree's order, the largest first."""
    order = values.sort(dim=1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))


def _point(trees: Trees, kept: Tensor) -> Point:
    return Point(float(kept.sum(1).double().mean()), 1 + float((kept & trees.accepted).sum(1).double().mean()))
