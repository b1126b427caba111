"""Inverted index of :mod:`effpass.lowering.ops.routed_attention`: for each block of keys, the tokens that chose it.

Triton kernels count the tokens of each block by tiles of 64 tokens, and then place them at offsets from a cumulative
sum, with one program per tile, 64 blocks and KV head. Without atomics, the tokens of a list are always in ascending
order, so that equal choices give bitwise equal results. The tokens that lie in a block come first in its list, because
no earlier token sees the block.

Shapes: T tokens, G KV heads, N blocks, P capacity of a token's list of blocks, E = T P, U = ceil(T / TILE) tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effpass.lowering.kernels.launch import launch_options, overlaps

__all__ = ["TILE", "Index", "Items"]

TILE = 64  # tokens per tile
_BLOCKS = 64  # blocks per program


class Index(NamedTuple):
    """Lists of the tokens that chose each block, one after another.

    Attributes:
        tokens: int32 [G, E], the tokens that chose block 0, then those that chose block 1, and so on.
        ranks: int32 [G, E], index of the block in the list of that token.
        offsets: int32 [G, N, U], offset in `tokens` of the tokens of each tile that chose the block.
        begin: int32 [G, N + 1], offset in `tokens` of each block's list, followed by the end of the last list.
    """

    tokens: Tensor
    ranks: Tensor
    offsets: Tensor
    begin: Tensor

    @classmethod
    def of(cls, chosen: Tensor, blocks: int) -> Index:
        """Build the index from `chosen` int32 [G, T, P], where -1 marks unused entries, over `blocks` blocks."""
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
    """Work items: pieces of the blocks' lists, each for one program, by part of the tokens.

    The tokens are processed in C parts, and each part has I items per KV head, some of which may be empty.

    Attributes:
        block: int32 [C, G, I], block of each item.
        first: int32 [C, G, I], offset of the item's first token in `Index.tokens`.
        end: int32 [C, G, I], offset after its last token; equal to `first` for an empty item.
        before: int32 [C, G, N], number of items of all blocks before each block.
        counts: int32 [C, G, N], number of items of each block.
    """

    block: Tensor
    first: Tensor
    end: Tensor
    before: Tensor
    counts: Tensor

    @classmethod
    def of(cls, index: Index, part: int, size: int, tokens: int) -> Items:
        """Cut the lists into items of up to `size` tokens, for parts of `part` tokens, which is a multiple of TILE."""
        low = index.offsets[:, :, :: part // TILE]
        high = torch.cat((low[:, :, 1:], index.begin[:, 1:, None]), 2)
        low, high = (x.permute(2, 0, 1).contiguous() for x in (low, high))
        counts = (high - low + size - 1) // size
        until = counts.cumsum(2, dtype=torch.int32)
        before, last = until - counts, counts.shape[2] - 1
        # All pieces of a list except the last one are full, and there are as many last pieces as blocks.
        most = min(part, tokens) * (index.tokens.shape[1] // tokens) // size + last + 1
        numbers = torch.arange(most, dtype=torch.int32, device=low.device).expand(*low.shape[:2], most).contiguous()
        at = torch.searchsorted(until, numbers, right=True).clamp(max=last)  # past the last item: the last block
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
