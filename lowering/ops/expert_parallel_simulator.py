"""Discrete-event simulation of an expert-parallel layer, for design; it measures nothing.

The simulation replays the issue order of :mod:`effpass.lowering.ops.expert_parallel` with the loads of one routing. The
link performs exchanges one at a time, each as soon as the slowest rank has reached it; every rank computes its stages
one at a time, more slowly while rows are on the link. Durations come from the fitted cost models. Results must be
labeled as simulated wherever they are shown.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from effpass.lowering.ops.expert_parallel_cost import STAGE_KERNELS, Link, best_kernel, exchange
from effpass.lowering.ops.moe_ffn_cost import Fit, Shape

__all__ = ["Event", "Timeline", "random_counts", "simulate"]


@dataclass(frozen=True)
class Event:
    """An interval in which a rank's experts or the link are busy.

    Attributes:
        what: ``"dispatch"``, ``"experts"`` or ``"combine"``.
        stage: index of the stage.
        rank: rank that computes; -1 for the link.
        begin: start in seconds from the first exchange.
        end: end in seconds from the first exchange.
    """

    what: str
    stage: int
    rank: int
    begin: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated layer.

    Attributes:
        events: intervals in the order of issue.
        seconds: time of the layer, including the overhead around its stages.
        hidden: share of the time on the link that is hidden by computation, on the rank where this share is smallest.
    """

    events: tuple[Event, ...]
    seconds: float
    hidden: float


def simulate(
    counts: np.ndarray, shape: Shape, stages: int, link: Link, fitted: Fit, *, replicated: bool = False
) -> Timeline:
    """Simulate one layer.

    Args:
        counts: [W, 3, W, L], counts that the ranks exchange; see `expert_parallel_routes.summarize`.
        shape: the layer, with all E experts.
        stages: number of stages N, at least 1.
        link: measurements of the link between the ranks.
        fitted: fitted constants of the device.
        replicated: whether all ranks have the same tokens.
    """
    ranks, local = counts.shape[0], counts.shape[3]
    by_stage = counts.reshape(ranks, 3, ranks, stages, local // stages)
    arriving, leaving = (_most(by_stage[:, kind].sum(-1)) for kind in (0, 1))
    loads = by_stage[:, 2].sum(0)  # rank, stage, expert
    events: list[Event] = []
    link_is_free, computing = 0.0, [0.0] * ranks

    def on_link(what: str, stage: int, rows: float, ready: float) -> float:
        nonlocal link_is_free
        begin = max(link_is_free, ready)
        link_is_free = begin + exchange(rows, shape, link)
        events.append(Event(what, stage, -1, begin, link_is_free))
        return link_is_free

    arrived = [0.0] * (stages + 1)
    if not replicated:
        arrived[0] = on_link("dispatch", 0, arriving[0], 0.0)
    for stage in range(stages):
        issued = stage * link.stage
        if not replicated and stage + 1 < stages:
            arrived[stage + 1] = on_link("dispatch", stage + 1, arriving[stage + 1], issued)
        busy = [(event.begin, event.end) for event in events if event.rank < 0]
        for rank in range(ranks):
            load = loads[rank, stage]
            begin = max(computing[rank], arrived[stage], issued)
            pairs, met = float(load.sum()), float((load > 0).sum())
            work = best_kernel(pairs, met, shape, fitted, STAGE_KERNELS)[1] if pairs else 0.0
            computing[rank] = _slowed(begin, work, busy, link.sharing)
            events.append(Event("experts", stage, rank, begin, computing[rank]))
        on_link("combine", stage, leaving[stage], max(*computing, issued + link.stage))
    seconds = link.around + max(link_is_free, *computing)
    if replicated:
        tokens = float(counts[:, 2].sum()) / max(shape.each, 1)
        seconds += exchange(tokens * (ranks - 1) / ranks, shape, link)
    return Timeline(tuple(events), seconds, _hidden(events, ranks))


def random_counts(tokens: int, shape: Shape, ranks: int, seed: int = 0, skew: float = 0.0) -> np.ndarray:
    """Sample a random routing and return its counts, for :func:`simulate`.

    Args:
        tokens: number of tokens of each rank.
        shape: the layer, with all E experts.
        ranks: number of ranks W.
        seed: seed of the routing.
        skew: exponent of a power law over the experts in random order: the n-th is chosen with weight n**-skew; 0 for
            equal weights.
    """
    random = np.random.default_rng(seed)
    likely = skew * np.log(1 + random.permutation(shape.experts))
    local = shape.experts // ranks
    counts = np.zeros((ranks, 3, ranks, local), dtype=np.int64)
    for rank in range(ranks):
        scores = random.gumbel(size=(tokens, shape.experts)) - likely
        ids = np.sort(np.argpartition(-scores, shape.each - 1, axis=1)[:, : shape.each], axis=1)
        holder = ids // local
        begins = np.diff(holder, axis=1, prepend=-1) != 0
        ends = np.diff(holder, axis=1, append=ranks) != 0
        for kind, chosen in enumerate((ids[begins], ids[ends], ids)):
            counts[rank, kind] = np.bincount(chosen.reshape(-1), minlength=shape.experts).reshape(ranks, local)
    return counts


def _most(rows: np.ndarray) -> list[float]:
    """Largest number of rows per stage that any rank exchanges with others; `rows` is [sender, receiver, stage]."""
    others = rows * (1 - np.eye(rows.shape[0], dtype=rows.dtype))[..., None]
    return np.maximum(others.sum(1).max(0), others.sum(0).max(0)).astype(float).tolist()


def _slowed(begin: float, work: float, busy: list[tuple[float, float]], sharing: float) -> float:
    """Time at which `work` seconds of work are done that take `sharing` times as long inside the intervals `busy`."""
    now = begin
    for first, last in sorted(busy):
        if last <= now:
            continue
        if now + work <= first:
            break
        work -= max(0.0, first - now)
        now = max(now, first)
        if now + work * sharing <= last:
            return now + work * sharing
        work -= (last - now) / sharing
        now = last
    return now + work


def _hidden(events: list[Event], ranks: int) -> float:
    travelling = [event for event in events if event.rank < 0]
    least = 1.0
    whole = sum(event.end - event.begin for event in travelling)
    for rank in range(ranks):
        own = [event for event in events if event.rank == rank]
        both = sum(max(0.0, min(a.end, b.end) - max(a.begin, b.begin)) for a in travelling for b in own)
        least = min(least, both / whole if whole else 0.0)
    return least
