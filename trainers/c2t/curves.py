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
from effpass.runtime.speculative.tree_size import LATEST
from effpass.trainers.c2t.trees import Trees

__all__ = ["Point", "Sizes", "by_confidence", "by_probability", "choose", "saved"]

BETAS = tuple(round(0.05 * i, 2) for i in range(1, 20))
_SLACK = 0.005  # maximum share of the throughput to lose by a larger β


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
    """Choose the number of nodes and β with the highest throughput, and the largest β that loses almost nothing of it.

    Args:
        trees: held-out trees.
        classifier: classifier to choose for.
        seconds: duration of a round, by the number of nodes including the root to which its tree is padded.
    """
    worth = _worth(trees, classifier)
    rank = _rank(worth)
    found: list[Sizes] = []
    for nodes in seconds:
        for beta in (0.0, *BETAS):
            kept = (worth >= beta) & (rank < nodes - 1)
            times = {size: time for size, time in seconds.items() if size <= nodes}
            found.append(Sizes(nodes, beta, _point(trees, kept).tokens / _mean_seconds(1 + kept.sum(1), times)))
    best = max(found, key=lambda sizes: sizes.rate)
    good = (x for x in found if x.nodes == best.nodes and x.rate >= best.rate * (1 - _SLACK))
    return max(good, key=lambda sizes: sizes.beta)


def _mean_seconds(nodes: Tensor, seconds: Mapping[int, float]) -> float:
    """Mean duration of a round whose tree is padded to the smallest size that holds it and those before it.

    Args:
        nodes: int64 `[N]`, numbers of nodes of trees, which are taken as independent of each other.
        seconds: durations by size; the largest size holds all trees.
    """
    mean = before = 0.0
    for size in sorted(seconds):
        fits = float((nodes <= size).double().mean()) ** LATEST
        mean, before = mean + (fits - before) * seconds[size], fits
    return mean


def _worth(trees: Trees, classifier: Classifier) -> Tensor:
    with torch.no_grad():
        return trees.along_paths(classifier(trees.features()).sigmoid())


def _rank(values: Tensor) -> Tensor:
    """Return the rank `[N, P]` of each candidate in its tree, 0 for the largest value."""
    order = values.sort(dim=1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))


def _point(trees: Trees, kept: Tensor) -> Point:
    return Point(float(kept.sum(1).double().mean()), 1 + float((kept & trees.accepted).sum(1).double().mean()))
