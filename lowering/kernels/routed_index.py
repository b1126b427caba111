"""Which tokens chose a block: the lists of :mod:`effpass.lowering.ops.routed_attention` the other way round.

Counted tile by tile and then placed, so that tokens of a list ascend and equal lists give equal bits: nothing is added
atomically. The tokens that lie in a block come first in its list, since none before them sees it.

Shapes: T tokens, G key-value heads, N blocks, P places of a token's list, E = T P, U = ceil(T / TILE) tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effpass.lowering.kernels.launch import launch_options, overlaps

__all__ = ["TILE", "Index", "Items"]

TILE = 64
_BLOCKS = 64


class Index(NamedTuple):
    """Tokens by block.

    Attributes:
        tokens: int32 [G, E], the tokens that chose block 0, then those of block 1 and so on.
        ranks: int32 [G, E], the place that the block has in that token's list.
        offsets: int32 [G, N, U], where the tokens of a tile begin in a block's list.
        begin: int32 [G, N + 1], where a block's list begins.
    """

    tokens: Tensor
    ranks: Tensor
    offsets: Tensor
    begin: Tensor

    @classmethod
    def of(cls, chosen: Tensor, blocks: int) -> Index:
        """From `chosen` int32 [G, T, P]."""
        groups, tokens, places = chosen.shape
        tiles, device = triton.cdiv(tokens, TILE), chosen.device
        counts = torch.empty((groups, blocks, tiles), dtype=torch.int32, device=device)
        grid = (tiles, triton.cdiv(blocks, _BLOCKS), groups)
        shape = {"TILE": TILE, "BLOCKS": _BLOCKS, **_options(device)}
        _count[grid](chosen, counts, tokens, places, blocks, **shape)
        until = counts.flatten(1).cumsum(1, dtype=torch.int32)
        offsets = (until - counts.flatten(1)).view(counts.shape)
        begin = torch.cat((offsets[:, :, 0], until[:, -1:]), 1)
        listed, ranks = torch.empty((2, groups, tokens * places), dtype=torch.int32, device=device)
        _place[grid](chosen, offsets, listed, ranks, tokens, places, blocks, **shape)
        return cls(listed, ranks, offsets, begin)


class Items(NamedTuple):
    """Pieces of blocks' lists, each the work of one program, for each of C parts of the tokens.

    Attributes:
        block: int32 [C, G, I], the block of an item.
        first: int32 [C, G, I], where its tokens begin in the lists of its key-value head.
        end: int32 [C, G, I], where they end; there, too, where there is no such item.
        before: int32 [C, G, N], items of the blocks in front.
        counts: int32 [C, G, N], items of a block.
    """

    block: Tensor
    first: Tensor
    end: Tensor
    before: Tensor
    counts: Tensor

    @classmethod
    def of(cls, index: Index, part: int, size: int, tokens: int) -> Items:
        """Items of up to `size` tokens, in parts of `part` tokens, a multiple of TILE."""
        low = index.offsets[:, :, :: part // TILE]
        high = torch.cat((low[:, :, 1:], index.begin[:, 1:, None]), 2)
        low, high = (x.permute(2, 0, 1).contiguous() for x in (low, high))
        counts = (high - low + size - 1) // size
        until = counts.cumsum(2, dtype=torch.int32)
        before, last = until - counts, counts.shape[2] - 1
        # Every list but the last piece is full, and there are as many last pieces as blocks.
        most = min(part, tokens) * (index.tokens.shape[1] // tokens) // size + last + 1
        numbers = torch.arange(most, dtype=torch.int32, device=low.device).expand(*low.shape[:2], most).contiguous()
        at = torch.searchsorted(until, numbers, right=True).clamp(max=last)  # behind the last item it is the last block
        first = torch.minimum(low.gather(2, at) + (numbers - before.gather(2, at)) * size, high.gather(2, at))
        end = torch.minimum(first + size, high.gather(2, at))
        return cls(at.to(torch.int32), first, end, before, counts)


def _options(device: torch.device) -> dict[str, object]:
    return launch_options(device, 4) | ({"launch_pdl": False} if overlaps(device) else {})


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _ranked(chosen, token, tokens, places, block, first, BLOCKS: tl.constexpr):
    """[TILE, BLOCKS]: one more than the place of a block in a token's list, 0 where it is not in it."""
    rank = tl.zeros([token.shape[0], BLOCKS], tl.int32)
    place = 0
    while place < places:
        found = tl.load(chosen + token.to(tl.int64) * places + place, mask=token < tokens, other=-1)
        if tl.max(((found >= first) & (found < first + BLOCKS)).to(tl.int32), 0) > 0:
            rank = tl.where(found[:, None] == block[None, :], place + 1, rank)
        place = tl.where(tl.max(found, 0) >= 0, place + 1, places)
    return rank


@triton.jit(do_not_specialize=["tokens", "places", "blocks"])
def _count(chosen, counts, tokens, places, blocks, TILE: tl.constexpr, BLOCKS: tl.constexpr):
    tile, group = tl.program_id(0), tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * BLOCKS
    token, block = tile * TILE + tl.arange(0, TILE), first + tl.arange(0, BLOCKS)
    rank = _ranked(chosen + group * tokens * places, token, tokens, places, block, first, BLOCKS)
    at = counts + (group * blocks + block) * tl.num_programs(0) + tile
    tl.store(at, tl.sum((rank > 0).to(tl.int32), 0), mask=block < blocks)


@triton.jit(do_not_specialize=["tokens", "places", "blocks"])
def _place(chosen, offsets, listed, ranks, tokens, places, blocks, TILE: tl.constexpr, BLOCKS: tl.constexpr):
    tile, group = tl.program_id(0), tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * BLOCKS
    token, block = tile * TILE + tl.arange(0, TILE), first + tl.arange(0, BLOCKS)
    rank = _ranked(chosen + group * tokens * places, token, tokens, places, block, first, BLOCKS)
    there = (rank > 0).to(tl.int32)
    begin = tl.load(offsets + (group * blocks + block) * tl.num_programs(0) + tile, mask=block < blocks, other=0)
    at = group * tokens * places + begin[None, :] + tl.cumsum(there, 0) - there
    tl.store(listed + at, tl.broadcast_to(token[:, None], [TILE, BLOCKS]), mask=rank > 0)
    tl.store(ranks + at, rank - 1, mask=rank > 0)
