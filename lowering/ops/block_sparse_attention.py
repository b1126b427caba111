"""Training-free block-sparse attention for prompts: each tile of queries attends to the blocks of keys it chooses.

    w[t, n] = mean_h softmax_n(scale · mean(q_h in tile t) · mean(k in block n))    over the blocks visible to the tile
    M[t]    = the blocks of largest w: a share of the visible blocks (`density`), or as many as hold a share of their
              total weight (`threshold`); always with the first blocks and those around the tile
    out[i]  = softmax attention of query i over the visible keys of the blocks in M[tile of i]

A tile is a run of consecutive queries, a block a run of consecutive cache slots. h runs over the query heads that share
a KV head and thus one choice. Scoring blocks by mean queries and mean keys follows the block-sparse heads of MInference
(https://arxiv.org/abs/2407.02490), the threshold follows FlexPrefill (https://arxiv.org/abs/2502.20766). Weights are
computed for a few tiles at a time, and choices are stored as lists of blocks, not as masks over tokens.
:mod:`effpass.runtime.sparse_attention` calls the operators for prompts.

Shapes: B batch, T tokens, S slots, H query heads, G KV heads, K key size, V value size,
Q = ceil(T / block_q) tiles, N = ceil(S / block_k) blocks, M capacity of a list of blocks.
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

#: Maximum deviation of a kernel's output from the reference; as in :mod:`effpass.lowering.ops.cached_attention`.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float64: 1e-6}
_WEIGHTS = 1 << 24  # pooled scores of query heads that are computed at once


@dataclass(frozen=True)
class BlockSelection:
    """Rule by which the queries of a prompt choose blocks of keys.

    Attributes:
        density: share of the visible blocks that a tile attends to.
        threshold: share of the pooled weight w that the chosen blocks hold, used instead of `density`; 0 to use
            `density`.
        block_q: queries per tile.
        block_k: slots per block.
        sink: number of blocks at the start of the sequence that every tile attends to.
        recent: number of blocks before a tile that it attends to, in addition to those that it overlaps.
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
        """Upper bound on the blocks that a tile always attends to; a tile overlaps up to block_q / block_k + 1."""
        return self.sink + self.recent + self.block_q // self.block_k + 2

    def places(self, slots: int) -> int:
        """Capacity of a tile's list of blocks in a cache of `slots` slots."""
        blocks = -(-slots // self.block_k)
        return blocks if self.threshold else min(blocks, max(self.kept, math.ceil(self.density * blocks)))

    @property
    def least(self) -> int:
        """Number of slots that `kept` blocks cover; shorter prompts get dense attention."""
        return self.kept * self.block_k


def block_sparse(
    how: BlockSelection, query: Tensor, keys: Tensor, values: Tensor, key_positions: Tensor, query_positions: Tensor,
    scale: float, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attend with :func:`choose_key_blocks` and :func:`block_sparse_attention`; returns [B, T, H, V]."""
    lists, counts = torch.ops.effpass.choose_key_blocks(
        query, keys, key_positions, query_positions, scale, how.block_q, how.block_k, how.sink, how.recent, how.density,
        how.threshold, how.places(keys.shape[2]),
    )  # fmt: skip
    return torch.ops.effpass.block_sparse_attention(
        query, keys, values, key_positions, query_positions, lists, counts, scale, softcap, how.block_q, how.block_k
    )


# -- block selection --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spans:
    """Ranges of positions in blocks of keys and tiles of queries, which determine what is visible.

    Attributes:
        low: [B, N], smallest position in each block; the largest int32 for a block without tokens.
        high: [B, N], largest position in each block; -1 for a block without tokens.
        least: [B, N], as `low`, but -1 if any slot of the block is empty.
        earliest: [B, Q], smallest position in each tile; the largest int32 for a tile without tokens.
        latest: [B, Q], largest position in each tile; -1 for a tile without tokens.
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
    """Means [B, H, blocks, K] of `x` [B, H, T, K] over the tokens of each block, without padding."""
    there = _in_blocks(positions >= 0, 1, size, 0)[:, None, ..., None]
    # The masked sum is a matrix product, so that x is read once and no masked copy of it is written.
    total = (_in_blocks(x, 2, size, 0).transpose(-1, -2) @ there.to(x.dtype).expand(-1, x.shape[1], -1, -1, -1))[..., 0]
    return (total / there.sum(3).clamp(min=1)).to(x.dtype)


def weights(
    query: Tensor, keys: Tensor, key_positions: Tensor, query_positions: Tensor, spans: Spans, scale: float,
    block_q: int, block_k: int,
) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """Yield the first tile and w, float32 [B, G, tiles, N], of successive tiles; -1 for blocks that are not visible."""
    q, k = _means(query, query_positions, block_q), _means(keys, key_positions, block_k)
    (batch, heads, tiles, _), (_, groups, blocks, _) = q.shape, k.shape
    at_once = max(1, _WEIGHTS // (batch * heads * blocks))
    k = k.transpose(-1, -2)[:, :, None]
    for first in range(0, tiles, at_once):
        span = slice(first, first + at_once)
        scores = (q[:, :, span].unflatten(1, (groups, -1)) @ k).float() * scale
        seen = (spans.high >= 0)[:, None] & (spans.low[:, None] <= spans.latest[:, span, None])
        seen = seen[:, None, None]
        found = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num().mean(2)
        yield first, found.masked_fill(~seen[:, :, 0], -1)


def _selected(
    w: Tensor, spans: Spans, first: int, block_k: int, sink: int, recent: int, density: float, threshold: float,
    places: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Lists int32 [B, G, tiles, places] and counts int32 [B, G, tiles, 2]; see :func:`choose_key_blocks`."""
    span = slice(first, first + w.shape[2])
    earliest, seen = spans.earliest[:, None, span, None].long(), w >= 0
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
        # The ceiling is taken in float32, as in the kernel.
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
    """Choose the blocks of keys that each tile of queries attends to.

    Args:
        query: [B, H, T, K].
        keys: [B, G, S, K].
        key_positions: int32 [B, S]; -1 in empty slots and padding.
        query_positions: int32 [B, T]; -1 for padding.
        scale: factor applied to the scores.
        block_q: queries per tile.
        block_k: slots per block.
        sink: number of blocks at the start of the sequence that are always chosen.
        recent: number of blocks before a tile that are always chosen.
        density: share of the visible blocks that a tile attends to.
        threshold: share of the pooled weight to hold instead; 0 to use `density`.
        places: capacity of a list.

    Returns:
        Lists int32 [B, G, Q, places] and counts int32 [B, G, Q, 2]. A list holds the *whole* blocks (all of whose keys
        every query of the tile sees) in ascending order, then the other chosen blocks in ascending order; further
        entries are undefined. The counts are the number of whole blocks and the number of all chosen blocks.
    """
    spans = Spans.of(key_positions, query_positions, block_q, block_k)
    kernels = triton_kernels("block_sparse_attention") if query.is_cuda else None
    select = _selected
    if kernels and spans.low.shape[1] <= kernels.MOST_BLOCKS:
        select = kernels.selected
    lists, counts = [], []
    for first, w in weights(query, keys, key_positions, query_positions, spans, scale, block_q, block_k):
        found = select(w, spans, first, block_k, sink, recent, density, threshold, places)
        lists.append(found[0])
        counts.append(found[1])
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
    """Attention of tiles of queries over their lists of blocks; a query sees positions up to its own.

    Args:
        query: [B, H, T, K], any strides.
        keys: [B, G, S, K], any strides with the last dimension contiguous.
        values: [B, G, S, V], any strides with the last dimension contiguous.
        key_positions: int32 [B, S]; -1 in empty slots and padding.
        query_positions: int32 [B, T]; -1 for padding.
        lists: int32 [B, G, Q, M], chosen blocks, from :func:`choose_key_blocks`.
        counts: int32 [B, G, Q, 2], numbers of whole and of all chosen blocks, from :func:`choose_key_blocks`.
        scale: factor applied to the scores.
        softcap: bound on the scores; 0 for none.
        block_q: queries per tile.
        block_k: slots per block.

    Returns:
        [B, T, H, V], contiguous.

    Raises:
        EffpassError: if sizes don't match.
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
    # On average, half of a list's places are in use, which cancels the factor 2 of multiply and add.
    return batch * heads * tokens * lists[3] * block_k * (key_size + values[3])
