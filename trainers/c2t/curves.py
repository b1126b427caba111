"""Emitted tokens as a function of verified nodes, for EAGLE-2 and C2T on collected trees.

    EAGLE-2 verifies the n most probable candidates; C2T those with a confidence of at least β, up to n of them

A tree emits one token more than it has accepted nodes. C2T is evaluated on the candidates that EAGLE-2 has expanded;
trees that C2T grows itself also have other candidates. The curves determine β and the number of nodes that are stored
with a classifier.
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
_SLACK = 0.005  # maximum share of the tokens to lose by a larger β


@dataclass(frozen=True)
class Point:
    """A point of a curve.

    Attributes:
        nodes: mean number of verified nodes per tree, without the root.
        tokens: mean number of emitted tokens per tree.
    """

    nodes: float
    tokens: float


def by_probability(trees: Trees, sizes: Sequence[int]) -> list[Point]:
    """Return the curve of EAGLE-2, which verifies the most probable nodes: one point for each of `sizes`."""
    rank = _rank(trees.probability)
    return [_point(trees, rank < size) for size in sizes]


def by_confidence(trees: Trees, classifier: Classifier, betas: Sequence[float], most: int = 1 << 30) -> list[Point]:
    """Return the curve of C2T, which verifies up to `most` nodes with a confidence of at least β: one point per β."""
    worth = _worth(trees, classifier)
    rank = _rank(worth)
    return [_point(trees, (worth >= beta) & (rank < most)) for beta in betas]


def saved(trees: Trees, classifier: Classifier, betas: Sequence[float] = BETAS) -> dict[float, float]:
    """Return, for each β, the share of verified nodes that C2T saves over EAGLE-2 at the same tokens per tree.

    EAGLE-2's number of nodes is interpolated on its curve. A β whose number of tokens is outside the curve is omitted.
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
    """Best tree sizes for one device.

    Attributes:
        nodes: maximum number of verified nodes, including the root.
        beta: threshold β on the confidence of a node.
        rate: estimated throughput in tokens per second.
    """

    nodes: int
    beta: float
    rate: float


def choose(trees: Trees, classifier: Classifier, seconds: Mapping[int, float]) -> Sizes:
    """Choose the number of nodes with the highest throughput, and the largest β at which it loses almost no tokens.

    Args:
        trees: held-out trees.
        classifier: classifier to choose for.
        seconds: duration of a round, by the number of nodes including the root.
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
    """Return the rank `[N, P]` of each candidate in its tree, 0 for the largest value."""
    order = values.sort(dim=1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))


def _point(trees: Trees, kept: Tensor) -> Point:
    return Point(float(kept.sum(1).double().mean()), 1 + float((kept & trees.accepted).sum(1).double().mean()))
