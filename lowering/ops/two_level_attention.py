"""Sparse attention of one token over keys that are selected at two levels: blocks, then tokens inside them.

    b_n = Σ_h Σ_c max(q_hc · min_nc, q_hc · max_nc)      an upper bound of Σ_h q_h · k_s over the keys of block n
        = Σ_h relu(q_h) · max_n + min(q_h, 0) · min_n    the same as one matrix product
    M   = top-k_b of b_n, with the first and the last blocks
    t_s = Σ_h Σ_c q_hc (low_s + step_s · label_sc)       over calibrated channels c, for s in the blocks of M
    S   = top-k_t of t_s
    out = Σ_{s in S} softmax_s(scale · q · k_s) v_s      exact attention over the keys of S

h runs over the query heads of a KV head, which share one choice. Among equal scores the lower index wins. A query that
sees at most k_t keys, in at most k_b blocks, gets dense attention. AsyncTLS (https://arxiv.org/abs/2604.07815) combines
the blocks of Quest (https://arxiv.org/abs/2406.10774) with the tokens of Double Sparsity
(https://arxiv.org/abs/2408.07092); in its pipelined form, M comes from the previous step. Latent attention (MLA) is the
case G = 1 in which values are the first V channels of the keys.

Shapes: B batch, H query heads, G KV heads, S slots, N blocks, K key size, V value size; C and P are those of the index,
:class:`~effpass.lowering.ops.two_level_attention_index.KeyIndex`, whose tensors hold min, max, label, low and step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.core.errors import EffpassError
from effpass.core.flops import smaller
from effpass.lowering.ops.kernel_choice import triton_kernels
from effpass.lowering.ops.two_level_attention_index import KeyIndex, Selection, gather_slots, index_blocks, parted

__all__ = [
    "KERNELS",
    "TOLERANCE",
    "attend",
    "block_scores",
    "has_kernels",
    "score_blocks",
    "top",
    "two_level_attention",
]

#: Maximum deviation of the kernels' output from the reference, relative to its largest value, if both choose the same
#: tokens; as in :mod:`effpass.lowering.ops.cached_attention`.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float64: 1e-6}
#: Description of what the GPU kernels support, for messages.
KERNELS = (
    "kernels take float32, float16 and bfloat16; heads of 16 to 256 channels, up to 32 of which share a key, or latents"
    " of a power of two up to 512 with a rotated part of up to 128; labels of 32 channels or more"
)


def attend(
    index: KeyIndex,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_positions: Tensor,
    query_positions: Tensor,
    filled: Tensor,
    scale: float,
    softcap: float = 0.0,
    block_table: Tensor | None = None,
    host: Tensor | None = None,
) -> Tensor:
    """Call :func:`two_level_attention` with the index of the first `query.shape[0]` sequences."""
    rows, how = index.rows(query.shape[0]), index.selection
    return torch.ops.effpass.two_level_attention(
        query, keys, values, block_table, host, key_positions, query_positions, filled, rows.channels, rows.statistics,
        rows.seen, rows.labels, rows.ranges, rows.scores, rows.chosen_blocks, rows.chosen_tokens, scale, softcap,
        how.block, how.sink, how.recent, how.statistic, how.aggregation, how.is_pipelined,
    )  # fmt: skip


def has_kernels(
    how: Selection, heads: int, groups: int, key_size: int, value_size: int, channels: int, dtype: torch.dtype
) -> bool:
    """Whether the GPU kernels support a layer. The reference reads `filled` on the host and can't run in a CUDA graph.

    Args:
        how: selection of keys.
        heads: number of query heads H.
        groups: number of KV heads G.
        key_size: key size K.
        value_size: value size V; with one KV head, a value below K means latents.
        channels: number of channels of a label.
        dtype: dtype of keys, values and queries.
    """
    kernels = triton_kernels("two_level_attention")
    if kernels is None:
        return False
    with torch.device("meta"):
        index = KeyIndex.empty(how, torch.empty(groups, channels, dtype=torch.int32), 1, how.block, key_size, dtype)
        query, keys = (torch.empty(1, count, 1, key_size, dtype=dtype) for count in (heads, groups))
        is_latent = groups == 1 and value_size < key_size
        values = keys[..., :value_size] if is_latent else torch.empty(1, groups, 1, value_size, dtype=dtype)
    return kernels.supported(
        query, keys, values, index.channels, index.labels, index.seen, index.chosen_blocks, index.chosen_tokens,
        how.block,
    )  # fmt: skip


# -- reference --------------------------------------------------------------------------------------------------------


def top(scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest scores of the last dimension, without scores of -inf; among equals the first."""
    kth = scores.topk(min(count, scores.shape[-1]), sorted=True).values[..., -1:]
    above, equal = scores > kth, scores == kth
    wanted = count - above.sum(-1, keepdim=True)
    return (above | equal & (equal.cumsum(-1) <= wanted)) & (scores > float("-inf"))


def listed(mask: Tensor, width: int) -> Tensor:
    """Indices at which `mask` is true, ascending, int32 [..., width], followed by -1."""
    places = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device).expand(mask.shape)
    out = torch.full((*mask.shape[:-1], width + 1), -1, dtype=torch.int32, device=mask.device)
    out.scatter_(-1, torch.where(mask, mask.cumsum(-1) - 1, width), places)
    return out[..., :width]


def block_scores(grouped: Tensor, statistics: Tensor, seen: Tensor, statistic: str, aggregation: str) -> Tensor:
    """Scores of blocks, float32 [B, G, N]; -inf for a block without tokens.

    Args:
        grouped: [B, G, R, K], queries of the R query heads of each KV head.
        statistics: [B, G, N, P, K].
        seen: int32 [B, G, N], number of tokens in each block.
        statistic: kind of the statistics.
        aggregation: reduction over the R heads.
    """
    if statistic == "min_max":
        weights = torch.cat((grouped.clamp(max=0), grouped.clamp(min=0)), -1)
    else:
        weights = grouped if statistic == "mean" else torch.cat((grouped, grouped.abs()), -1)
    scores = weights @ statistics.flatten(3).to(grouped.dtype).transpose(-1, -2)
    return _aggregated(scores, aggregation).masked_fill(seen == 0, float("-inf")).float()


def _aggregated(scores: Tensor, aggregation: str) -> Tensor:
    return scores.sum(2) if aggregation == "sum" else scores.amax(2)


def _chosen_blocks(scores: Tensor, seen: Tensor, last: int, count: int, sink: int, recent: int) -> Tensor:
    """Chosen blocks, int32 [B, G, count]."""
    there = seen > 0
    number = torch.arange(scores.shape[-1], device=scores.device)
    forced = (there.cumsum(-1) <= sink) | (number > last - recent)
    scores = scores.masked_fill(forced, float("inf")).masked_fill(~there, float("-inf"))
    return listed(top(scores, count), count)


def _token_scores(
    grouped: Tensor, slots: Tensor | None, channels: Tensor, labels: Tensor, ranges: Tensor, aggregation: str
) -> Tensor:
    """Token scores [B, G, L] from the labels of `slots` [B, G, L], or of all slots."""
    batch, _, heads, _ = grouped.shape
    q = grouped.gather(3, channels.long()[None, :, None].expand(batch, -1, heads, -1))
    if slots is not None:
        at = slots.clamp(min=0).long()[..., None]
        labels, ranges = (x.gather(2, at.expand(*at.shape[:3], x.shape[3])) for x in (labels, ranges))
    codes = torch.cat((labels & 15, labels >> 4), -1).to(q.dtype)
    step, low = ranges.to(q.dtype).unbind(-1)
    scores = q @ codes.transpose(-1, -2) * step[:, :, None] + q.sum(-1)[..., None] * low[:, :, None]
    return _aggregated(scores, aggregation)


def _two_level_attention(
    query: Tensor, keys: Tensor, values: Tensor, block_table: Tensor | None, host: Tensor | None,
    key_positions: Tensor, query_positions: Tensor, end: int, channels: Tensor, statistics: Tensor, seen: Tensor,
    labels: Tensor, ranges: Tensor, scores: Tensor, chosen_blocks: Tensor, chosen_tokens: Tensor, scale: float,
    softcap: float, block: int, sink: int, recent: int, statistic: str, aggregation: str, is_pipelined: bool,
) -> Tensor:  # fmt: skip
    (batch, heads, _, key_size), groups = query.shape, channels.shape[0]
    host_keys, host_values = (None, None) if host is None else parted(host, key_size, values.shape[-1])
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).reshape(batch, groups, heads // groups, key_size)
    last = (end - 1) // block
    index_blocks(
        keys, block_table, key_positions, end, last, last, channels, statistics, seen, labels, ranges, block, statistic,
        host_keys,
    )  # fmt: skip

    def visible(slots: Tensor) -> Tensor:
        of_keys = key_positions[:, None].expand(-1, groups, -1).gather(2, slots.clamp(0, key_positions.shape[1] - 1))
        return (slots >= 0) & (slots < end) & (of_keys >= 0) & (of_keys <= query_positions[:, None])

    slots: Tensor | None = None
    if chosen_blocks.shape[2]:
        now = slice(0, last + 1)
        found = block_scores(grouped, statistics[:, :, now], seen[:, :, now], statistic, aggregation)
        found[:, :, last] = float("inf")  # the block is still growing, so the next step must choose it
        scores[:, :, end % 2, now] = found
        used = scores[:, :, (end - 1) % 2, now] if is_pipelined else found
        chosen_blocks.copy_(_chosen_blocks(used, seen[:, :, now], last, chosen_blocks.shape[2], sink, recent))
        inside = torch.arange(block, device=keys.device)
        slots = (chosen_blocks[..., None].long() * block + inside).flatten(2)
        slots = torch.where((slots < 0) | (slots >= end), -1, slots)
    if chosen_tokens.shape[2]:
        if slots is None:
            slots = torch.arange(end, device=keys.device).expand(batch, groups, -1)
            labels, ranges = labels[:, :, :end], ranges[:, :, :end]
            of_tokens = _token_scores(grouped, None, channels, labels, ranges, aggregation)
        else:
            of_tokens = _token_scores(grouped, slots, channels, labels, ranges, aggregation)
        # Adding 0.0 turns -0.0 into 0.0, since the kernels compare scores as integers.
        of_tokens = (of_tokens + 0.0).masked_fill(~visible(slots), float("-inf"))
        places = listed(top(of_tokens, chosen_tokens.shape[2]), chosen_tokens.shape[2])
        slots = torch.where(places < 0, -1, slots.gather(2, places.clamp(min=0).long()))
        chosen_tokens.copy_(slots)
    assert slots is not None
    k, v = (
        gather_slots(x, block_table, slots, block, far).to(wide)
        for x, far in ((keys, host_keys), (values, host_values))
    )
    return _attention_over(grouped, k, v, visible(slots), scale, softcap, query.dtype)


def _attention_over(
    grouped: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float, dtype: torch.dtype
) -> Tensor:
    """Attention [B, 1, H, V] of queries [B, G, R, K] over the visible ones of L keys and values [B, G, L, K]."""
    of_keys = grouped @ k.transpose(-1, -2) * scale
    if softcap:
        of_keys = softcap * torch.tanh(of_keys / softcap)
    there = visible[:, :, None]
    weights = of_keys.masked_fill(~there, float("-inf")).softmax(-1).masked_fill(~there.any(-1, keepdim=True), 0)
    out = weights @ v.masked_fill(~visible[..., None], 0)
    return out.flatten(1, 2)[:, None].to(dtype).contiguous()


# -- two_level_attention ----------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "effpass::two_level_attention",
    mutates_args=("statistics", "seen", "labels", "ranges", "scores", "chosen_blocks", "chosen_tokens"),
    schema="(Tensor query, Tensor keys, Tensor values, Tensor? block_table, Tensor? host, Tensor key_positions, "
    "Tensor query_positions, Tensor filled, Tensor channels, Tensor(a!) statistics, Tensor(b!) seen, "
    "Tensor(c!) labels, Tensor(d!) ranges, Tensor(e!) scores, Tensor(f!) chosen_blocks, Tensor(g!) chosen_tokens, "
    "float scale, float softcap, int block, int sink, int recent, str statistic, str aggregation, bool is_pipelined) "
    "-> Tensor",
)
def two_level_attention(
    query: Tensor, keys: Tensor, values: Tensor, block_table: Tensor | None, host: Tensor | None,
    key_positions: Tensor, query_positions: Tensor, filled: Tensor, channels: Tensor, statistics: Tensor, seen: Tensor,
    labels: Tensor, ranges: Tensor, scores: Tensor, chosen_blocks: Tensor, chosen_tokens: Tensor, scale: float,
    softcap: float, block: int, sink: int, recent: int, statistic: str, aggregation: str, is_pipelined: bool,
) -> Tensor:  # fmt: skip
    """Perform one step: add the last token's key to the index, and attend to the selected keys.

    Args:
        query: [B, H, 1, K], any strides.
        keys: [B, G, S, K], last dimension contiguous, including the new key; or pages [pages, block, K].
        values: [B, G, S, V] or [pages, block, V], last dimension contiguous; for latents a view of `keys`.
        block_table: int32 [B, G, N], page of each block, or None. Without `host`, chosen blocks must have pages.
        host: [B, G, N, block, W], all keys and values (:mod:`~effpass.lowering.ops.block_pool`), read for blocks
            without a page (-1); or None.
        key_positions: int32 [B, S]; -1 in empty slots and padding.
        query_positions: int32 [B, 1]; -1 for padding, which outputs 0.
        filled: int32 [1], number of slots in use, including the new one.
        channels: int32 [G, C].
        statistics: [B, G, N, P, K], written, as are all up to `chosen_tokens`; see :class:`KeyIndex`.
        seen: int32 [B, G, N].
        labels: uint8 [B, G, S, C/2].
        ranges: float16 [B, G, S, 2].
        scores: float32 [B, G, 2, N].
        chosen_blocks: int32 [B, G, k_b]; with k_b = 0 the tokens of all blocks are considered.
        chosen_tokens: int32 [B, G, k_t]; with k_t = 0 attention is over whole blocks.
        scale: factor applied to the scores.
        softcap: bound on the scores; 0 for none.
        block: slots per block.
        sink: number of blocks at the start of the sequence that are always chosen.
        recent: number of blocks up to the last one that are always chosen.
        statistic: ``"min_max"``, ``"mean"`` or ``"mean_std"``.
        aggregation: ``"sum"`` or ``"max"`` over the query heads of a KV head.
        is_pipelined: whether to choose blocks by the scores of the previous step.

    Returns:
        [B, 1, H, V], contiguous.

    Raises:
        EffpassError: if there is more than one token, or sizes don't match.
    """
    _check(query, keys, values, block_table, host, key_positions, channels)
    arguments = (
        channels, statistics, seen, labels, ranges, scores, chosen_blocks, chosen_tokens, scale, softcap, block, sink,
        recent, statistic, aggregation, is_pipelined,
    )  # fmt: skip
    if query.is_cuda:
        kernels = triton_kernels("two_level_attention")
        if kernels and kernels.supported(
            query, keys, values, channels, labels, seen, chosen_blocks, chosen_tokens, block
        ):
            return kernels.two_level_attention(
                query, keys, values, block_table, host, key_positions, query_positions, filled, *arguments
            )
        if torch.cuda.is_current_stream_capturing():
            raise EffpassError(
                f"effpass::two_level_attention: no kernel for a query {tuple(query.shape)}, keys {tuple(keys.shape)}, "
                f"values {tuple(values.shape)} and labels of {channels.shape[1]} channels in {query.dtype}, and a CUDA "
                "graph can't hold the reference",
                hint=KERNELS,
            )
    return _two_level_attention(
        query, keys, values, block_table, host, key_positions, query_positions, int(filled), *arguments
    )


def _check(
    query: Tensor, keys: Tensor, values: Tensor, block_table: Tensor | None, host: Tensor | None,
    key_positions: Tensor, channels: Tensor,
) -> None:  # fmt: skip
    (batch, heads, tokens, key_size), groups = query.shape, channels.shape[0]
    if tokens != 1 or heads % groups or keys.shape[-1] != key_size or values.shape[:-1] != keys.shape[:-1]:
        raise EffpassError(
            f"effpass::two_level_attention: a query {tuple(query.shape)} can't attend to keys {tuple(keys.shape)} and "
            f"values {tuple(values.shape)} of {groups} key-value heads",
            hint="one token, and a number of query heads that is a multiple of the key-value heads",
        )
    expected = (batch, groups, key_positions.shape[1]) if block_table is None else keys.shape[:2]
    if keys.dim() != (4 if block_table is None else 3) or tuple(keys.shape[: len(expected)]) != tuple(expected):
        raise EffpassError(
            f"effpass::two_level_attention: keys {tuple(keys.shape)} for key_positions {tuple(key_positions.shape)}",
            hint="keys are [B, G, S, K], or pages [pages, block, K] with a block_table",
        )
    if host is not None:
        widths = (key_size + values.shape[-1], key_size)
        if block_table is None or host.dim() != 5 or host.shape[:3] != block_table.shape or host.shape[4] not in widths:
            raise EffpassError(
                f"effpass::two_level_attention: host {tuple(host.shape)} for a block_table"
                f" {None if block_table is None else tuple(block_table.shape)} and keys of {key_size}",
                hint=f"host is [B, G, N, block, W], W = {widths[0]}, or {widths[1]} of latents, beside a block_table",
            )


@two_level_attention.register_fake
def _(query, keys, values, block_table, host, key_positions, query_positions, filled, channels, *args):  # type: ignore[no-untyped-def]
    _check(query, keys, values, block_table, host, key_positions, channels)
    return query.new_empty((query.shape[0], 1, query.shape[1], values.shape[-1]))


@register_flop_formula(torch.ops.effpass.two_level_attention)
def _(query: Any, keys: Any, values: Any, block_table: Any, host: Any, key_positions: Any, query_positions: Any,
      filled: Any, channels: Any, statistics: Any, seen: Any, labels: Any, ranges: Any, scores: Any, chosen_blocks: Any,
      chosen_tokens: Any, scale: Any, softcap: Any, block: int, *args: Any, out_val: Any = None,
      **kwargs: Any) -> Any:  # fmt: skip
    batch, heads, _, key_size = query
    bounds = statistics[2] * statistics[3] * key_size
    candidates = smaller(chosen_blocks[2] * block or labels[2], key_positions[1])
    of_labels = candidates * channels[1] if chosen_tokens[2] else 0
    attended = smaller(chosen_tokens[2] or candidates, key_positions[1])
    return 2 * batch * heads * (bounds + of_labels + attended * (key_size + values[-1]))


# -- score_blocks -----------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "effpass::score_blocks",
    mutates_args=("scores",),
    schema="(Tensor query, Tensor statistics, Tensor seen, Tensor filled, Tensor(a!) scores, int block, str statistic, "
    "str aggregation) -> ()",
)
def score_blocks(
    query: Tensor, statistics: Tensor, seen: Tensor, filled: Tensor, scores: Tensor, block: int, statistic: str,
    aggregation: str,
) -> None:  # fmt: skip
    """Score all blocks by a query, for the first step of a pipeline, which has no previous step.

    Args:
        query: [B, H, 1, K], last query of the prompt.
        statistics: [B, G, N, P, K].
        seen: int32 [B, G, N], number of tokens in each block.
        filled: int32 [1], number of slots in use.
        scores: float32 [B, G, 2, N], written.
        block: slots per block.
        statistic: kind of the statistics.
        aggregation: reduction over the query heads of a KV head.
    """
    batch, groups, blocks = seen.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).reshape(batch, groups, -1, query.shape[-1])
    found = block_scores(grouped, statistics, seen, statistic, aggregation)
    number = torch.arange(blocks, device=seen.device)
    last = (filled - 1) // block
    found = torch.where(number == last, float("inf"), found.masked_fill(number > last, float("-inf")))
    is_now = torch.arange(2, device=seen.device)[:, None] == filled % 2
    scores.copy_(torch.where(is_now, found[:, :, None], scores))


@score_blocks.register_fake
def _(*args: Any) -> None:
    return None


@register_flop_formula(torch.ops.effpass.score_blocks)
def _(query: Any, statistics: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> Any:
    return 2 * query[0] * query[1] * statistics[2] * statistics[3] * statistics[4]
