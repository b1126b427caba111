"""Triton kernels for the routing of `effpass::expert_parallel`: destination and order of the rows and pairs to send.

They compute what :mod:`effpass.lowering.ops.expert_parallel_routes` defines, where rows (tokens sent to a rank) and
pairs (a token with one of its experts) are explained, in few launches and without a sort. Tokens or pairs are cut into
at most 64 blocks, with one program per block, or per block and rank. One launch counts what each block holds; the next
one finds the offset of its block as the sum of the counts of the blocks before it, so that the order is that of a
stable sort. All arithmetic is on integers; router weights travel as the bits of float32.

Shapes: T tokens, k experts per token, W ranks, L experts per rank, R rows, P pairs, N stages, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from effpass.lowering.kernels.moe_library import plain_options
from effpass.lowering.kernels.moe_route import route
from effpass.lowering.ops.expert_parallel_routes import Departures, Pairs, Plan, Summary

__all__ = ["arrivals", "departures", "summarize"]

_MOST_BLOCKS = 64  # maximum number of blocks, whose counts a program adds up at once


@dataclass(frozen=True)
class _Counted(Summary):
    """A summary with the counts of each block of tokens.

    Attributes:
        blocks: int32 [B, 3, W·L], `counts` by block.
    """

    blocks: Tensor


def _block(items: int, least: int) -> int:
    return max(least, triton.next_power_of_2(triton.cdiv(items, _MOST_BLOCKS)))


def summarize(experts: Tensor, ranks: int, local: int) -> Summary:
    """Same as `expert_parallel_routes.summarize`, except that `first` and `last` are int32."""
    (tokens, each), device = experts.shape, experts.device
    block = _block(tokens, 32)
    blocks = triton.cdiv(tokens, block)
    counts = torch.zeros(blocks, 3, ranks * local, dtype=torch.int32, device=device)
    first, last = (torch.empty(tokens, ranks, dtype=torch.int32, device=device) for _ in range(2))
    if tokens:
        _summarize[(blocks,)](
            experts.contiguous(), first, last, counts, tokens, each, ranks, local, BLOCK=block,
            SLOTS=triton.next_power_of_2(each), **plain_options(device, 4),
        )  # fmt: skip
    return _Counted(first, last, counts.sum(0), counts)


def departures(summary: Summary, experts: Tensor, weights: Tensor, plan: Plan, first_token: int = 0) -> Departures:
    """Same as `expert_parallel_routes.departures`, except that `back` is undefined where a token has no row on a rank.

    `summary` must come from :func:`summarize`. Weights are sent as float32.
    """
    assert isinstance(summary, _Counted)
    (tokens, ranks), each, device = summary.first.shape, experts.shape[1], experts.device
    rows = torch.empty(plan.rows_sent, dtype=torch.int32, device=device)
    back = torch.empty(tokens, ranks, dtype=torch.int32, device=device)
    words = torch.empty(sum(plan.pairs_sent), 4, dtype=torch.int32, device=device)
    block = _block(tokens, 32)
    tables = np.concatenate(
        [_begins(plan.sent), plan.targets.reshape(-1), _begins(plan.regained), _begins([plan.pairs_sent])]
    )
    if tokens:
        blocks = triton.cdiv(tokens, block)
        _depart[(blocks, ranks)](
            experts.contiguous(), weights.contiguous(), summary.first, summary.last, summary.blocks,
            torch.from_numpy(tables.astype(np.int32)).to(device), rows, back, words, tokens, each, ranks,
            len(plan.loads), plan.stages, first_token, BLOCK=block, SLOTS=triton.next_power_of_2(each),
            BLOCKS=triton.next_power_of_2(blocks), SIZE=triton.next_power_of_2(plan.size),
            LOCAL=triton.next_power_of_2(len(plan.loads)), **plain_options(device, 4),
        )  # fmt: skip
    return Departures(rows, back, words)


def arrivals(words: Tensor, plan: Plan) -> Pairs:
    """Same as `expert_parallel_routes.arrivals`."""
    pairs, rows, device = words.shape[0], plan.rows_got, words.device
    block = _block(pairs, 128)
    blocks = triton.cdiv(pairs, block)
    experts = torch.empty(pairs, 1, dtype=torch.int32, device=device)
    leaves = torch.empty(pairs, dtype=torch.int32, device=device)
    counts = torch.zeros(blocks, plan.stages, dtype=torch.int32, device=device)
    begin, end = (torch.empty(rows, dtype=torch.int32, device=device) for _ in range(2))
    if not pairs:
        return Pairs(
            words, experts[:, 0], torch.zeros(len(plan.loads) + 1, dtype=torch.int32, device=device), begin, end
        )
    _leaves[(blocks,)](
        words, experts, leaves, counts, pairs, plan.size, plan.stages, BLOCK=block, **plain_options(device, 4)
    )  # fmt: skip
    starts = torch.from_numpy(_begins([list(map(sum, plan.returned))]).astype(np.int32)).to(device)
    _arrive[(blocks,)](
        words, leaves, counts, starts, begin, end, pairs, plan.stages, BLOCK=block,
        BLOCKS=triton.next_power_of_2(blocks), **plain_options(device, 4),
    )  # fmt: skip
    order, of_experts = route(experts, len(plan.loads))
    return Pairs(words, order, of_experts, begin, end)


def _begins(counts: list[list[int]]) -> np.ndarray:
    flat = np.array(counts, dtype=np.int64).reshape(-1)
    return flat.cumsum() - flat


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens", "each", "ranks", "local"])
def _summarize(experts, first, last, counts, tokens, each, ranks, local, BLOCK: tl.constexpr, SLOTS: tl.constexpr):
    block, slot = tl.program_id(0), tl.arange(0, SLOTS)
    token = block * BLOCK + tl.arange(0, BLOCK)
    every = ranks * local
    known = (token < tokens)[:, None] & (slot < each)[None, :]
    ids = tl.load(experts + token[:, None] * each + slot[None, :], mask=known, other=2147483647).to(tl.int32)
    known &= ids < every
    counts += block * 3 * every
    tl.atomic_add(counts + 2 * every + ids, 1, mask=known)
    for rank in range(ranks):
        here = known & (ids // local == rank)
        least = tl.min(tl.where(here, ids - rank * local, local), 1)
        most = tl.max(tl.where(here, ids - rank * local, -1), 1)
        tl.store(first + token * ranks + rank, least, mask=token < tokens)
        tl.store(last + token * ranks + rank, most, mask=token < tokens)
        tl.atomic_add(counts + rank * local + least, 1, mask=most >= 0)
        tl.atomic_add(counts + every + rank * local + most, 1, mask=most >= 0)


@triton.jit(do_not_specialize=["tokens", "each", "ranks", "local", "stages", "first_token"])
def _depart(
    experts, weights, first, last, counts, tables, rows, back, words, tokens, each, ranks, local, stages, first_token,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    block, rank, slot = tl.program_id(0), tl.program_id(1), tl.arange(0, SLOTS)
    token = block * BLOCK + tl.arange(0, BLOCK)
    every, size = ranks * local, local // stages
    least = tl.load(first + token * ranks + rank, mask=token < tokens, other=0)
    most = tl.load(last + token * ranks + rank, mask=token < tokens, other=-1)
    here = most >= 0
    before = counts + rank * local + tl.arange(0, BLOCKS)[:, None] * 3 * every
    in_front = (tl.arange(0, BLOCKS) < block)[:, None]
    expert = tl.arange(0, SIZE)[None, :]
    target, place = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for stage in range(stages):
        inside = in_front & (expert < size)
        of_stage = before + stage * size + expert
        at = stage * ranks + rank
        mine = here & (least // size == stage)
        number = tl.sum(tl.sum(tl.load(of_stage, mask=inside, other=0), 1), 0) + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(rows + tl.load(tables + at) + number, token, mask=mine)
        target = tl.where(mine, tl.load(tables + stages * ranks + at) + number, target)
        mine = here & (most // size == stage)
        number = tl.sum(tl.sum(tl.load(of_stage + every, mask=inside, other=0), 1), 0)
        number += tl.cumsum(mine.to(tl.int32), 0) - 1
        place = tl.where(mine, tl.load(tables + 2 * stages * ranks + at) + number, place)
    tl.store(back + token * ranks + rank, place, mask=here)
    known = here[:, None] & (slot < each)[None, :]
    ids = tl.load(experts + token[:, None] * each + slot[None, :], mask=known, other=2147483647).to(tl.int32)
    known &= ids // local == rank
    within = tl.cumsum(known.to(tl.int32), 1) - 1
    number = tl.sum(known.to(tl.int32), 1)
    expert = tl.arange(0, LOCAL)[None, :]
    of_rank = tl.load(before + 2 * every + expert, mask=in_front & (expert < local), other=0)
    begin = tl.load(tables + 3 * stages * ranks + rank) + tl.sum(tl.sum(of_rank, 1), 0)
    begin += tl.cumsum(number, 0) - number
    to = words + (begin[:, None] + within).to(tl.int64) * 4
    weight = tl.load(weights + token[:, None] * each + slot[None, :], mask=known, other=0).to(tl.float32)
    tl.store(to, tl.broadcast_to(target[:, None], [BLOCK, SLOTS]), mask=known)
    tl.store(to + 1, ids - rank * local, mask=known)
    tl.store(to + 2, tl.broadcast_to((token + first_token)[:, None], [BLOCK, SLOTS]), mask=known)
    tl.store(to + 3, weight.to(tl.int32, bitcast=True), mask=known)


@triton.jit(do_not_specialize=["pairs", "size", "stages"])
def _leaves(words, experts, leaves, counts, pairs, size, stages, BLOCK: tl.constexpr):
    """For each row, where its first pair stands, the stage after which it leaves; -1 for other pairs."""
    block = tl.program_id(0)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    known = pair < pairs
    row = tl.load(words + pair * 4, mask=known, other=-1)
    begins = known & ((pair == 0) | (tl.load(words + pair * 4 - 4, mask=known & (pair > 0), other=-1) != row))
    expert = tl.load(words + pair * 4 + 1, mask=known, other=0)
    tl.store(experts + pair, expert, mask=known)
    most, following, goes_on = expert, pair + 1, begins
    while tl.max(goes_on.to(tl.int32), 0) > 0:
        inside = goes_on & (following < pairs)
        goes_on = inside & (tl.load(words + following * 4, mask=inside, other=-1) == row)
        most = tl.maximum(most, tl.load(words + following * 4 + 1, mask=goes_on, other=-1))
        following += 1
    stage = tl.where(begins, most // size, -1)
    tl.store(leaves + pair, stage, mask=known)
    tl.atomic_add(counts + block * stages + stage, 1, mask=begins)


@triton.jit(do_not_specialize=["pairs", "stages"])
def _arrive(words, leaves, counts, starts, begin, end, pairs, stages, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    block, before = tl.program_id(0), tl.arange(0, BLOCKS)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    leaving = tl.load(leaves + pair, mask=pair < pairs, other=-1)
    place = tl.zeros([BLOCK], tl.int32)
    for stage in range(stages):
        mine = leaving == stage
        number = tl.sum(tl.load(counts + before * stages + stage, mask=before < block, other=0), 0)
        number += tl.load(starts + stage) + tl.cumsum(mine.to(tl.int32), 0) - 1
        place = tl.where(mine, number, place)
    row = tl.load(words + pair * 4, mask=leaving >= 0, other=-1)
    last, goes_on = pair + 1, leaving >= 0
    while tl.max(goes_on.to(tl.int32), 0) > 0:
        inside = goes_on & (last < pairs)
        goes_on = inside & (tl.load(words + last * 4, mask=inside, other=-1) == row)
        last += goes_on.to(tl.int32)
    tl.store(begin + place, pair, mask=leaving >= 0)
    tl.store(end + place, last, mask=leaving >= 0)
