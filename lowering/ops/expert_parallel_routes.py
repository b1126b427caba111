"""Routing of an expert-parallel layer: which rows go to which rank, in which stage and in which order.

A token is sent to a rank once, however many of its experts are there; such a token is a *row*. Rank r holds the experts
r·L … r·L + L - 1 and computes them in N *stages* of L / N experts each. A row is sent for the stage of its first expert
on that rank, and its sum returns after the stage of its last one, so that the amount of data does not depend on N. A
*pair* is a token with one of its experts. The orders are:

    arriving rows     by stage of the first expert, sending rank, token
    returning sums    by stage of the last expert, computing rank, token
    pairs             by sending rank, token, place among its experts; each is one row of `words`

Every rank receives three counts per expert from every rank (:func:`summarize`); all other sizes follow on the host, for
any N (:func:`plan`). Positions stay on the device. This module computes them in plain PyTorch;
:mod:`effpass.lowering.kernels.expert_routes` has kernels for GPUs.

Shapes: T tokens, k experts per token, W ranks, L experts per rank, R rows, P pairs, N stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from effpass.core.errors import EffpassError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Departures", "Pairs", "Plan", "Summary", "arrivals", "departures", "plan", "summarize"]


@dataclass(frozen=True)
class Summary:
    """Destinations of the tokens of one rank.

    Attributes:
        first: [T, W], first expert of a token on each rank, 0 … L - 1; L if it has none there.
        last: [T, W], last expert of a token on each rank; -1 if it has none there.
        counts: int64 [3, W·L], number of rows by their first expert, of rows by their last expert, and of pairs by
            expert.
    """

    first: Tensor
    last: Tensor
    counts: Tensor


def summarize(experts: Tensor, ranks: int, local: int) -> Summary:
    """Summarize the expert ids `experts` [T, k]; ids of W·L or more belong to no rank.

    Raises:
        EffpassError: on the CPU, if an id is negative. On a GPU the check would have to wait for the ids.
    """
    ids, every = experts.long(), ranks * local
    if not ids.is_cuda and ids.numel() and int(ids.min()) < 0:
        raise EffpassError(
            f"effpass::expert_parallel got the expert id {int(ids.min())}",
            hint=f"ids are 0 ... {every - 1}; {every} and more for an expert that nobody holds",
        )
    ids = ids.clamp(max=every)
    rank, own = ids // local, ids % local
    shape = (ids.shape[0], ranks + 1)
    first = ids.new_full(shape, local).scatter_reduce_(1, rank, own, "amin")[:, :ranks]
    last = ids.new_full(shape, -1).scatter_reduce_(1, rank, own, "amax")[:, :ranks]
    begin, nobody = torch.arange(0, every, local, device=ids.device), ids.new_tensor(every)
    found = (torch.where(last >= 0, begin + first, nobody), torch.where(last >= 0, begin + last, nobody), ids)
    counts = ids.new_zeros(3, every + 1)
    for count, values in zip(counts, found, strict=True):
        flat = values.reshape(-1)
        count.scatter_add_(0, flat, torch.ones_like(flat))
    return Summary(first, last, counts[:, :every])


@dataclass(frozen=True)
class Plan:
    """Sizes and offsets of everything that is exchanged, from the view of one rank.

    Attributes:
        stages: number of stages N.
        sent: [N][W], rows sent to each rank for each stage.
        got: [N][W], rows received from each rank for each stage.
        returned: [N][W], sums sent back to each rank after each stage.
        regained: [N][W], sums received from each rank after each stage.
        pairs_sent: [W], pairs sent to each rank.
        pairs_got: [W], pairs received from each rank.
        loads: [L], pairs of each expert of this rank.
        ends: [L], end of each expert's pairs when this rank's pairs are sorted by expert.
        targets: int64 [N, W], offset in rank r's buffer at which this rank's rows of a stage begin.
    """

    stages: int
    sent: list[list[int]]
    got: list[list[int]]
    returned: list[list[int]]
    regained: list[list[int]]
    pairs_sent: list[int]
    pairs_got: list[int]
    loads: list[int]
    ends: list[int]
    targets: NDArray[np.int64]

    @property
    def size(self) -> int:
        """Number of experts per stage."""
        return len(self.loads) // self.stages

    @property
    def rows_sent(self) -> int:
        return sum(map(sum, self.sent))

    @property
    def rows_got(self) -> int:
        return sum(map(sum, self.got))


def plan(counts: NDArray[np.int64], me: int, stages: int) -> Plan:
    """Compute the plan of rank `me`.

    Args:
        counts: [W, 3, W, L], counts of every rank.
        me: this rank.
        stages: number of stages N, a divisor of L.
    """
    ranks, local = counts.shape[0], counts.shape[3]
    rows, leaving = counts[:, :2].reshape(ranks, 2, ranks, stages, local // stages).sum(-1).transpose(1, 0, 2, 3)
    pairs = counts[:, 2]  # sender, receiver, expert
    mine = pairs[:, me].sum(0)
    arriving = rows.transpose(1, 2, 0).reshape(ranks, -1)  # receiver; stage and sender
    begins = (arriving.cumsum(1) - arriving).reshape(ranks, stages, ranks)
    return Plan(
        stages=stages,
        sent=rows[me].T.tolist(),
        got=rows[:, me].T.tolist(),
        returned=leaving[:, me].T.tolist(),
        regained=leaving[me].T.tolist(),
        pairs_sent=pairs[me].sum(-1).tolist(),
        pairs_got=pairs[:, me].sum(-1).tolist(),
        loads=mine.tolist(),
        ends=mine.cumsum().tolist(),
        targets=begins[:, :, me].T,
    )


@dataclass(frozen=True)
class Departures:
    """What a rank sends, and where the sums that come back will be.

    Attributes:
        tokens: [R], token of each row to send, in the order of `Plan.sent`.
        back: [T, W], position of the sum that each rank returns for a token; -1 for none.
        words: int32 [P, 3 + 1 or 2], what the receiver needs to know of each pair: its row and its expert there, its
            token, and the bits of its weight (1 word for float32, 2 for float64).
    """

    tokens: Tensor
    back: Tensor
    words: Tensor


def departures(summary: Summary, experts: Tensor, weights: Tensor, plan: Plan, first_token: int = 0) -> Departures:
    """Arrange rows and pairs in the order in which they are sent.

    Args:
        summary: summary of `experts`.
        experts: [T, k], expert ids.
        weights: [T, k], router weights, float32 or float64.
        plan: plan with the number of stages that will run.
        first_token: index of token 0 among the tokens of all ranks, for replicated tokens.
    """
    (tokens, ranks), each = summary.first.shape, experts.shape[1]
    local, rows, never, device = len(plan.loads), plan.rows_sent, plan.stages * summary.first.shape[1], experts.device
    here, rank = summary.last >= 0, torch.arange(ranks, device=device)
    arrives = torch.where(here, summary.first // plan.size * ranks + rank, never).reshape(-1)
    leaves = torch.where(here, summary.last // plan.size * ranks + rank, never).reshape(-1)
    numbers = torch.arange(rows, device=device)

    order = arrives.argsort(stable=True)[:rows]
    begins = np.array(plan.sent).reshape(-1)
    shift = torch.from_numpy(plan.targets.reshape(-1) - (begins.cumsum() - begins)).to(device)
    target = arrives.new_empty(tokens * ranks)
    target[order] = numbers + shift[arrives[order]]
    back = arrives.new_full((tokens * ranks,), -1)
    back[leaves.argsort(stable=True)[:rows]] = numbers

    ids = experts.long().clamp(max=ranks * local)
    pairs = (ids // local).reshape(-1).argsort(stable=True)[: sum(plan.pairs_sent)]
    token, expert = pairs // each, ids.reshape(-1)[pairs]
    words = torch.stack((target[token * ranks + expert // local], expert % local, token + first_token), 1)
    bits = weights.reshape(-1)[pairs].unsqueeze(1).view(torch.int32)
    return Departures(order // ranks, back.view(tokens, ranks), torch.cat((words.int(), bits), 1))


@dataclass(frozen=True)
class Pairs:
    """The pairs that a rank computes. Pairs of the same row are adjacent.

    Attributes:
        words: int32 [P, 4 or 5], as in :class:`Departures`.
        order: [P], the pairs sorted by expert.
        starts: [L + 1], offsets of each expert's pairs in `order`.
        begin: [R], first pair of each row, with rows in the order in which their sums return.
        end: [R], end of each row's pairs, in the same order.
    """

    words: Tensor
    order: Tensor
    starts: Tensor
    begin: Tensor
    end: Tensor

    @property
    def weights(self) -> Tensor:
        """Router weights, [P]."""
        # A view as float64 needs contiguous memory that is aligned to 8 bytes.
        bits = self.words[:, 3:].clone(memory_format=torch.contiguous_format)
        return bits.view(torch.float32 if bits.shape[1] == 1 else torch.float64).squeeze(1)


def arrivals(words: Tensor, plan: Plan) -> Pairs:
    """Read the pairs that other ranks have sent.

    Args:
        words: int32 [P, 4 or 5], pairs by sending rank, from :func:`departures`.
        plan: the plan used to send them.
    """
    row, expert = words[:, 0].long(), words[:, 1].long()
    pairs = torch.arange(words.shape[0], device=words.device)
    end = row.new_zeros(plan.rows_got).scatter_reduce_(0, row, pairs + 1, "amax")
    begin = torch.full_like(end, words.shape[0]).scatter_reduce_(0, row, pairs, "amin")
    leaves = torch.zeros_like(end).scatter_reduce_(0, row, expert // plan.size, "amax")
    # Pairs arrive ordered by sending rank and token, so that a row's first pair gives its place in that order.
    by_token = begin.argsort()
    leaving = by_token[leaves[by_token].argsort(stable=True)]
    starts = words.new_tensor([0, *plan.ends])
    return Pairs(words, expert.argsort(stable=True), starts, begin[leaving], end[leaving])
