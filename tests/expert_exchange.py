"""What ranks would send to each other, in one process: layers whose experts are spread, without any group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effpass.lowering.ops import expert_parallel_routes as routes

__all__ = ["Ranks", "start"]


@dataclass
class Ranks:
    """All ranks of a layer.

    Attributes:
        ids: [T, k] of each.
        weights: [T, k] of each.
        summaries: of each.
        plans: of each.
        departures: of each.
        words: that each got.
    """

    ids: list[Tensor]
    weights: list[Tensor]
    summaries: list[Any]
    plans: list[Any]
    departures: list[Any]
    words: list[Tensor]

    def arrive(self, rows: list[Tensor], me: int) -> Tensor:
        """What rank `me` has got when all stages' rows have arrived; `rows` are those of each rank's tokens."""
        sent = [
            rows[rank][self.departures[rank].tokens.long()].split([n for stage in plan.sent for n in stage])
            for rank, plan in enumerate(self.plans)
        ]
        stages, world = self.plans[me].stages, len(self.plans)
        return torch.cat([sent[rank][stage * world + me] for stage in range(stages) for rank in range(world)])

    def come_back(self, sums: list[Tensor], me: int) -> Tensor:
        """What rank `me` has got back when the sums of all ranks' rows have returned, in the order in which they go."""
        sent = [sums[rank].split([n for stage in plan.returned for n in stage]) for rank, plan in enumerate(self.plans)]
        stages, world = self.plans[me].stages, len(self.plans)
        return torch.cat([sent[rank][stage * world + me] for stage in range(stages) for rank in range(world)])


def start(ids: list[Tensor], weights: list[Tensor], local: int, stages: int, by: Any = routes) -> Ranks:
    """Everything up to the arrival of pairs.

    Args:
        ids: [T, k] of each rank.
        weights: [T, k] of each rank.
        local: experts of a rank.
        stages: N.
        by: the module of operators, or that of kernels.
    """
    world = len(ids)
    summaries = [by.summarize(each, world, local) for each in ids]
    counts = torch.stack([s.counts for s in summaries]).cpu().long().view(world, 3, world, local).numpy()
    plans = [routes.plan(counts, me, stages) for me in range(world)]
    first = torch.tensor([0, *(len(each) for each in ids)]).cumsum(0).tolist()
    departures = [by.departures(summaries[me], ids[me], weights[me], plans[me], first[me]) for me in range(world)]
    words = [
        torch.cat([d.words.split(plan.pairs_sent)[me] for d, plan in zip(departures, plans, strict=True)])
        for me in range(world)
    ]
    return Ranks(ids, weights, summaries, plans, departures, words)
