"""Attention of a prompt over blocks of keys that each tile of queries chooses, without training.

    w[t, n] = Σ_h softmax_n(scale · mean(q_h in tile t) · mean(k in block n))     over blocks that the tile sees
    M[t]    = the blocks of largest w that hold a share of them (`density`), or of their weight (`threshold`),
              with the first blocks, and those around the tile itself
    out[i]  = softmax attention of query i over the visible keys of the blocks in M[tile of i]

h runs over the query heads that share keys, which choose together. Scores of pooled blocks are those of MInference's
block-sparse heads (https://arxiv.org/abs/2407.02490), the threshold is FlexPrefill's (https://arxiv.org/abs/2502.20766).
Weights of a few tiles at a time are in memory, and of what is chosen lists of blocks: nothing grows with the square of
the tokens.

Shapes: B batch, T tokens, S slots, H query heads, G key-value heads, K key size, V value size, Q = ceil(T / block_q)
tiles, N = ceil(S / block_k) blocks, M places of a list.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.core.errors import EffpassError
from effpass.lowering.ops.kernel_choice import triton_kernels
from effpass.lowering.ops.two_level_attention import listed, top

__all__ = ["TOLERANCE", "BlockSelection", "block_sparse", "block_sparse_attention", "choose_key_blocks"]

#: As in :mod:`effpass.lowering.ops.cached_attention`.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float64: 1e-6}
_WEIGHTS = 1 << 24  # at once


@dataclass(frozen=True)
class BlockSelection:
    """Which keys the queries of a prompt attend to.

    Attributes:
        density: share of the blocks that a tile sees.
        threshold: share of the pooled weight to hold instead; 0 for none.
        block_q: queries of a tile.
        block_k: slots of a block.
        sink: blocks from the first token on that every tile keeps.
        recent: blocks in front of a tile that it keeps, beside those that it lies in.
    """

    density: float = 0.25
    threshold: float = 0.0
    block_q: int = 128
    block_k: int = 128
    sink: int = 1
    recent: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1 or not 0 <= self.threshold <= 1:
            raise EffpassError(
                f"block selection: density is {self.density}, threshold {self.threshold}",
                hint="shares: density in (0, 1], threshold in [0, 1]",
            )
        if self.block_q not in (64, 128) or self.block_k not in (32, 64, 128):
            raise EffpassError(
                f"block selection: block_q is {self.block_q}, block_k {self.block_k}",
                hint="tiles of 64 or 128 queries, blocks of 32, 64 or 128 slots",
            )

    @property
    def kept(self) -> int:
        """Blocks that are kept always: the tile lies in up to block_q / block_k + 1."""
        return self.sink + self.recent + self.block_q // self.block_k + 2

    def places(self, slots: int) -> int:
        """Places of a list."""
        blocks = -(-slots // self.block_k)
        return blocks if self.threshold else min(blocks, max(self.kept, math.ceil(self.density * blocks)))

    def least(self, slots: int) -> int:
        """The number of slots up to which every block is kept anyhow."""
        return self.kept * self.block_k


def block_sparse(
    how: BlockSelection, query: Tensor, keys: Tensor, values: Tensor, key_positions: Tensor, query_positions: Tensor,
    scale: float, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """[B, T, H, V]: :func:`choose_key_blocks`, then :func:`block_sparse_attention`."""
    lists, counts = torch.ops.effpass.choose_key_blocks(
        query, keys, key_positions, query_positions, scale, how.block_q, how.block_k, how.sink, how.recent, how.density,
        how.threshold, how.places(keys.shape[2]),
    )  # fmt: skip
    return torch.ops.effpass.block_sparse_attention(
        query, keys, values, key_positions, query_positions, lists, counts, scale, softcap, how.block_q, how.block_k
    )


# -- what is chosen ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spans:
    """Positions in blocks of keys and in tiles of queries.

    Attributes:
        low: [B, N], the first position of a block; large where there is none.
        high: [B, N], the last; -1 where there is none.
        least: [B, N], the least number, -1 where a slot is empty.
        earliest: [B, Q], the first position of a tile; large where there is none.
        latest: [B, Q], the last; -1 where there is none.
    """

    low: Tensor
    high: Tensor
    least: Tensor
    earliest: Tensor
    latest: Tensor

    @classmethod
    def of(cls, key_positions: Tensor, query_positions: Tensor, block_q: int, block_k: int) -> Spans:
        k, q = (_in_blocks(x, 1, n, -1) for x, n in ((key_positions, block_k), (query_positions, block_q)))
        far = torch.iinfo(torch.int32).max
        firsts = (x.masked_fill(x < 0, far).amin(2) for x in (k, q))
        low, earliest = firsts
        return cls(low, k.amax(2), k.amin(2), earliest, q.amax(2))


def _in_blocks(x: Tensor, dim: int, size: int, fill: float) -> Tensor:
    missing = -x.shape[dim] % size
    if missing:
        x = torch.cat((x, x.new_full((*x.shape[:dim], missing, *x.shape[dim + 1 :]), fill)), dim)
    return x.unflatten(dim, (-1, size))


def _means(x: Tensor, positions: Tensor, size: int) -> Tensor:
    """Means [B, H, blocks, K] of x [B, H, T, K] over the real tokens of each block."""
    there = _in_blocks(positions >= 0, 1, size, 0)[:, None, ..., None]
    # A masked sum as a product: the whole of x is read once and not written again.
    total = (_in_blocks(x, 2, size, 0).transpose(-1, -2) @ there.to(x.dtype).expand(-1, x.shape[1], -1, -1, -1))[..., 0]
    return (total / there.sum(3).clamp(min=1)).to(x.dtype)


def weights(
    query: Tensor, keys: Tensor, key_positions: Tensor, query_positions: Tensor, spans: Spans, scale: float,
    block_q: int, block_k: int,
) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """The first tile, and w float32 [B, G, tiles, N], of some tiles after the others; -1 where a block is not seen."""
    q, k = _means(query, query_positions, block_q), _means(keys, key_positions, block_k)
    (batch, heads, tiles, _), (_, groups, blocks, _) = q.shape, k.shape
    at_once = max(1, _WEIGHTS // (batch * heads * blocks))
    k = k.transpose(-1, -2)[:, :, None]
    for first in range(0, tiles, at_once):
        some = slice(first, first + at_once)
        scores = (q[:, :, some].unflatten(1, (groups, -1)) @ k).float() * scale
        seen = (spans.high >= 0)[:, None] & (spans.low[:, None] <= spans.latest[:, some, None])
        seen = seen[:, None, None]
        found = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num().mean(2)
        yield first, found.masked_fill(~seen[:, :, 0], -1)


def _selected(
    w: Tensor, spans: Spans, first: int, block_k: int, sink: int, recent: int, density: float, threshold: float,
    places: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Lists int32 [B, G, tiles, places] and counts int32 [B, G, tiles, 2]."""
    some = slice(first, first + w.shape[2])
    earliest, seen = spans.earliest[:, None, some, None].long(), w >= 0
    high, least = (x[:, None, None] for x in (spans.high, spans.least))
    is_near = high.long() + recent * block_k >= earliest
    forced = seen & (is_near | (seen.cumsum(-1) <= sink))
    scores = w.masked_fill(forced, float("inf")).masked_fill(~seen, float("-inf"))
    if threshold:
        order = scores.sort(dim=-1, descending=True, stable=True)
        ordered = w.clamp(min=0).gather(-1, order.indices)
        before = ordered.cumsum(-1) - ordered
        wanted = (before < threshold * ordered.sum(-1, keepdim=True)) | (order.values == float("inf"))
        chosen = torch.zeros_like(seen).scatter(-1, order.indices, wanted) & seen
        chosen &= chosen.cumsum(-1) <= places
    else:
        # Ceil in float32, as on the device.
        count = torch.ceil(seen.sum(-1, keepdim=True).float() * density).clamp(max=places)
        count = torch.maximum(count, forced.sum(-1, keepdim=True).float())
        descending = scores.sort(dim=-1, descending=True, stable=True).indices
        rank = torch.empty_like(descending).scatter_(
            -1, descending, torch.arange(w.shape[-1], device=w.device).expand_as(descending)
        )
        chosen = top(scores, places) & (rank < count)
    is_whole = (least >= 0) & (high <= earliest)
    whole, torn = chosen & is_whole, chosen & ~is_whole
    counts = torch.stack((whole.sum(-1), chosen.sum(-1)), -1).to(torch.int32)
    lists = listed(whole, places)
    of_torn = listed(torn, places)
    place = torch.arange(places, device=w.device)
    after = (place - counts[..., :1]).clamp(min=0).long()
    return torch.where(place < counts[..., :1], lists, of_torn.gather(-1, after)), counts


@torch.library.custom_op(
    "effpass::choose_key_blocks",
    mutates_args=(),
    schema="(Tensor query, Tensor keys, Tensor key_positions, Tensor query_positions, float scale, int block_q, "
    "int block_k, int sink, int recent, float density, float threshold, int places) -> (Tensor, Tensor)",
)
def choose_key_blocks(
    query: Tensor, keys: Tensor, key_positions: Tensor, query_positions: Tensor, scale: float, block_q: int,
    block_k: int, sink: int, recent: int, density: float, threshold: float, places: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The blocks of keys of every tile of queries.

    Args:
        query: [B, H, T, K].
        keys: [B, G, S, K].
        key_positions: int32 [B, S]; -1 in empty slots and padding.
        query_positions: int32 [B, T]; -1 for padding.
        scale: factor on the scores.
        block_q: queries of a tile.
        block_k: slots of a block.
        sink: blocks kept from the first token on.
        recent: blocks kept in front of a tile.
        density: share of the blocks that a tile sees.
        threshold: share of the pooled weight; 0 for none.
        places: of a list.

    Returns:
        Lists int32 [B, G, Q, places], whole blocks (all of whose keys every query sees) in order, then the others in
        order, -1 or anything behind; and int32 [B, G, Q, 2], how many are whole, and how many there are.
    """
    spans = Spans.of(key_positions, query_positions, block_q, block_k)
    kernels = triton_kernels("block_sparse_attention") if query.is_cuda else None
    select = _selected
    if kernels and spans.low.shape[1] <= kernels.MOST_BLOCKS:
        select = kernels.selected
    lists, counts = [], []
    for first, w in weights(query, keys, key_positions, query_positions, spans, scale, block_q, block_k):
        some = select(w, spans, first, block_k, sink, recent, density, threshold, places)
        lists.append(some[0])
        counts.append(some[1])
    return torch.cat(lists, 2), torch.cat(counts, 2)


@choose_key_blocks.register_fake
def _(query, keys, key_positions, query_positions, scale, block_q, block_k, sink, recent, density, threshold, places):  # type: ignore[no-untyped-def]
    tiles = (query.shape[2] + block_q - 1) // block_q
    shape = (query.shape[0], keys.shape[1], tiles)
    return (
        query.new_empty((*shape, places), dtype=torch.int32),
        query.new_empty((*shape, 2), dtype=torch.int32),
    )


@register_flop_formula(torch.ops.effpass.choose_key_blocks)
def _(query: Any, keys: Any, key_positions: Any, query_positions: Any, scale: Any, block_q: int, block_k: int,
      *args: Any, out_val: Any = None, **kwargs: Any) -> Any:  # fmt: skip
    batch, heads, tokens, size = query
    return 2 * batch * heads * (tokens // block_q + 1) * (keys[2] // block_k + 1) * size


# -- attention --------------------------------------------------------------------------------------------------------


def _block_sparse_attention(
    query: Tensor, keys: Tensor, values: Tensor, key_positions: Tensor, query_positions: Tensor, lists: Tensor,
    counts: Tensor, scale: float, softcap: float, block_q: int, block_k: int,
) -> Tensor:  # fmt: skip
    (batch, heads, tokens, _), (_, groups, slots, value_size) = query.shape, values.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty((batch, tokens, heads, value_size))
    inside = torch.arange(block_k, device=query.device)
    for tile in range(lists.shape[2]):
        here = slice(tile * block_q, (tile + 1) * block_q)
        width = int(counts[:, :, tile, 1].max()) if counts.numel() else 0
        number = lists[:, :, tile, :width].long()
        live = torch.arange(width, device=query.device) < counts[:, :, tile, 1:]
        slot = (number[..., None] * block_k + inside).flatten(2)
        live = live[..., None].expand(-1, -1, -1, block_k).flatten(2) & (slot < slots)
        slot = torch.where(live, slot, 0)
        k, v = (
            x.gather(2, slot[..., None].expand(-1, -1, -1, x.shape[-1])).to(wide).unsqueeze(2) for x in (keys, values)
        )
        q = query[:, :, here].to(wide).unflatten(1, (groups, -1))
        scores = q @ k.transpose(-1, -2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        of_keys = key_positions[:, None].expand(-1, groups, -1).gather(2, slot)[:, :, None, None]
        of_queries = query_positions[:, None, None, here, None]
        visible = live[:, :, None, None] & (of_keys >= 0) & (of_keys <= of_queries)
        a = scores.masked_fill(~visible, float("-inf")).softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0)
        out[:, here] = (a @ v).flatten(1, 2).transpose(1, 2).to(query.dtype)
    return out


@torch.library.custom_op(
    "effpass::block_sparse_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor keys, Tensor values, Tensor key_positions, Tensor query_positions, Tensor lists, "
    "Tensor counts, float scale, float softcap, int block_q, int block_k) -> Tensor",
)
def block_sparse_attention(
    query: Tensor, keys: Tensor, values: Tensor, key_positions: Tensor, query_positions: Tensor, lists: Tensor,
    counts: Tensor, scale: float, softcap: float, block_q: int, block_k: int,
) -> Tensor:  # fmt: skip
    """Attention of tiles of queries over listed blocks of keys; a query sees positions up to its own.

    Args:
        query: [B, H, T, K], any strides.
        keys: [B, G, S, K], any strides with the last dimension contiguous.
        values: [B, G, S, V], likewise.
        key_positions: int32 [B, S]; -1 in empty slots and padding.
        query_positions: int32 [B, T]; -1 for padding.
        lists: int32 [B, G, Q, M], as :func:`choose_key_blocks` returns them.
        counts: int32 [B, G, Q, 2].
        scale: factor on the scores.
        softcap: bound on the scores; 0 for none.
        block_q: queries of a tile.
        block_k: slots of a block.

    Returns:
        [B, T, H, V], contiguous.

    Raises:
        EffpassError: sizes don't match.
    """
    tiles = -(-query.shape[2] // block_q)
    if query.shape[1] % keys.shape[1] or lists.shape[:3] != (query.shape[0], keys.shape[1], tiles):
        raise EffpassError(
            f"effpass::block_sparse_attention: lists {tuple(lists.shape)} for a query {tuple(query.shape)} and keys "
            f"{tuple(keys.shape)}",
            hint=f"lists are [B, G, Q, M] with Q = {tiles} tiles of {block_q} queries, and G divides the query heads",
        )
    if query.is_cuda:
        kernels = triton_kernels("block_sparse_attention")
        if kernels and kernels.supported(query, keys, values, block_k, scale):
            return kernels.block_sparse_attention(
                query, keys, values, key_positions, query_positions, lists, counts, scale, softcap, block_q, block_k
            )
    return _block_sparse_attention(
        query, keys, values, key_positions, query_positions, lists, counts, scale, softcap, block_q, block_k
    )


@block_sparse_attention.register_fake
def _(query, keys, values, *args):  # type: ignore[no-untyped-def]
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, values.shape[-1]))


@register_flop_formula(torch.ops.effpass.block_sparse_attention)
def _(query: Any, keys: Any, values: Any, key_positions: Any, query_positions: Any, lists: Any, counts: Any, scale: Any,
      softcap: Any, block_q: Any, block_k: int, *args: Any, out_val: Any = None, **kwargs: Any) -> Any:  # fmt: skip
    batch, heads, tokens, key_size = query
    return batch * heads * tokens * lists[3] * block_k * (key_size + values[3])  # half of the places, in the mean
