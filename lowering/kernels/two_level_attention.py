"""Two-level sparse attention in three launches: kernels of `two_level_attention`.

    score    statistics of all blocks times the query; one more program a head enters the new key into the index
    choose   top-k blocks, then the label scores of their tokens
    attend   top-k tokens, then attention over them (:mod:`effpass.lowering.kernels.chosen_attention`)

A choice is made by every program that needs it, each for itself: that costs no more time than by one of them, and no
program waits for another. Before it waits for the launch in front, a launch reads what an earlier one has written: the
query (which `score` waits for), and in `score` the statistics, which the step before left.

Where whole blocks are attended to, `choose` falls away; where all tokens are looked at, `narrow` stands for it: it
keeps the best of every 8192 tokens, until at most 16384 are left.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.chosen_attention import BLOCKS, LISTED, TOKENS, attend_chosen, block_keys, fits
from effpass.lowering.kernels.key_index import STATISTICS, index_block, indexable, label_shape, strides
from effpass.lowering.kernels.largest import NEVER, choose, in_order
from effpass.lowering.kernels.launch import launch_options, multiprocessors, overlaps

__all__ = ["supported", "two_level_attention"]

_MOST = 16384  # scores that one program chooses among
_NARROWED = 8192


def supported(
    query: Tensor, keys: Tensor, values: Tensor, channels: Tensor, labels: Tensor, seen: Tensor, chosen_blocks: Tensor,
    chosen_tokens: Tensor, block: int,
) -> bool:  # fmt: skip
    """Whether there are kernels for `query` [B, H, 1, K]: at most 16384 blocks, and as many tokens to choose from."""
    kept, tokens = chosen_blocks.shape[2], chosen_tokens.shape[2]
    candidates = kept * block if kept and tokens else 0
    return (
        indexable(keys, channels, labels)
        and fits(query, keys, values, channels.shape[0])
        and max(seen.shape[2], candidates) <= _MOST
        and (kept > 0 or tokens <= _NARROWED // 2)
    )


def two_level_attention(
    query: Tensor, keys: Tensor, values: Tensor, block_table: Tensor | None, host: Tensor | None,
    key_positions: Tensor, query_positions: Tensor, filled: Tensor, channels: Tensor, statistics: Tensor, seen: Tensor,
    labels: Tensor, ranges: Tensor, scores: Tensor, chosen_blocks: Tensor, chosen_tokens: Tensor, scale: float,
    softcap: float, block: int, sink: int, recent: int, statistic: str, aggregation: str, is_pipelined: bool,
) -> Tensor:  # fmt: skip
    """`effpass::two_level_attention` where :func:`supported`."""
    (batch, heads, _, key_size), (groups, of_label) = query.shape, channels.shape
    device, slots, repeat, of_heads = query.device, key_positions.shape[1], heads // groups, batch * groups
    query = query if query.stride(-1) == 1 else query.contiguous()
    blocks, kept, tokens = triton.cdiv(slots, block), chosen_blocks.shape[2], chosen_tokens.shape[2]
    shape = label_shape(of_label, key_size)
    block_r = max(16, triton.next_power_of_2(repeat))
    is_max, pdl = aggregation == "max", overlaps(device)
    of_query = (query.stride(0), query.stride(1))
    cached = (*strides(keys, block_table), key_positions.stride(0))

    width = statistics.shape[3] * key_size if kept else 16
    chunk = min(256, max(16, triton.next_power_of_2(width)))
    block_n = 64 if width <= 256 else 16
    _score[((triton.cdiv(blocks, block_n) if kept else 0) + 1, of_heads)](
        query, keys, block_table, key_positions, filled, channels, statistics, seen, labels, ranges, scores, *of_query,
        *cached, slots, blocks, host, GROUPS=groups, REPEAT=repeat, KEY=key_size, CHANNELS=of_label, BLOCK=block,
        STATISTIC=STATISTICS[statistic], HAS_BLOCKS=kept > 0, HAS_LABELS=tokens > 0, MAX=is_max, WIDTH=width,
        HOST=0 if host is None else host.shape[-1],
        PDL=pdl, BLOCK_R=block_r, BLOCK_N=block_n, CHUNK=chunk, **shape, **launch_options(device, 4, 3),
    )  # fmt: skip
    of_scores = slots_of = None
    of_labels = (channels, labels, ranges, key_positions, query_positions)
    if kept and tokens:
        kind, candidates, limit = TOKENS, kept * block, tokens
        of_scores = torch.empty((of_heads, candidates), dtype=torch.float32, device=device)
        splits = max(1, min(triton.cdiv(candidates, shape["TILE"]), 2 * multiprocessors(device) // of_heads, kept))
        _choose[(splits, of_heads)](
            query, filled, seen, scores, chosen_blocks, of_scores, *of_labels, *of_query, key_positions.stride(0),
            query_positions.stride(0), slots, blocks, GROUPS=groups, REPEAT=repeat, CHANNELS=of_label, BLOCK=block,
            KEPT=kept, SINK=sink, RECENT=recent, PIPELINED=is_pipelined, MAX=is_max, PDL=pdl, SPLITS=splits,
            BLOCK_R=block_r, ALL=triton.next_power_of_2(max(blocks, 16)),
            SHARE=triton.next_power_of_2(triton.cdiv(kept, splits)), HALF=shape["HALF"], TILE=shape["TILE"],
            **launch_options(device, 8),
        )  # fmt: skip
    elif kept:
        kind, candidates, limit = BLOCKS, blocks, kept
    else:
        kind, limit = LISTED, tokens
        of_scores, slots_of = _narrow_all(query, filled, of_labels, tokens, slots, repeat, is_max, block_r, shape)
        candidates = of_scores.shape[1]
    return attend_chosen(
        query, keys, values, block_table, host, key_positions, query_positions, filled, chosen_blocks, chosen_tokens,
        of_scores, slots_of, seen, scores, scale, softcap, block, sink, recent, is_pipelined, kind, candidates, limit,
    )  # fmt: skip


def _narrow_all(
    query: Tensor, filled: Tensor, of_labels: tuple[Tensor, ...], tokens: int, slots: int, repeat: int, is_max: bool,
    block_r: int, shape: dict[str, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores and slots [B G, L] of at most 16384 tokens, among them the best `tokens` of all."""
    channels, _, _, key_positions, query_positions = of_labels
    groups, of_label = channels.shape
    of_heads, device = query.shape[0] * groups, query.device
    count, before, places = slots, None, None
    while True:
        chunks, keep = triton.cdiv(count, _NARROWED), min(tokens, _NARROWED)
        new_scores = torch.empty((of_heads, chunks * keep), dtype=torch.float32, device=device)
        new_places = torch.empty((of_heads, chunks * keep), dtype=torch.int32, device=device)
        is_first = before is None
        scratch = (
            torch.empty((of_heads, chunks * _NARROWED), dtype=torch.float32, device=device) if is_first else before
        )
        _narrow[(chunks, of_heads)](
            query, filled, scratch, places, new_scores, new_places, *of_labels, query.stride(0), query.stride(1),
            key_positions.stride(0), query_positions.stride(0), slots, count, GROUPS=groups, REPEAT=repeat,
            CHANNELS=of_label, KEEP=keep, FIRST=is_first, MAX=is_max, PDL=overlaps(device), BLOCK_R=block_r,
            ALL=_NARROWED, HALF=shape["HALF"], TILE=shape["TILE"], **launch_options(device, 8),
        )  # fmt: skip
        before, places, narrowed = new_scores, new_places, chunks * keep
        if narrowed <= _MOST or narrowed >= count:
            return before, places
        count = narrowed


# -- scores -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["slots", "blocks"])
def _score(
    query, keys, block_table, key_positions, filled, channels, statistics, seen, labels, ranges, scores, query_b,
    query_h, keys_b, keys_h, keys_s, positions_b, slots, blocks, host, GROUPS: tl.constexpr, REPEAT: tl.constexpr,
    KEY: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, STATISTIC: tl.constexpr, HAS_BLOCKS: tl.constexpr,
    HAS_LABELS: tl.constexpr, MAX: tl.constexpr, WIDTH: tl.constexpr, HOST: tl.constexpr, PDL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program 0 of a head enters the new key, the others score blocks."""
    part, head = tl.program_id(0), tl.program_id(1)
    b, group = (head // GROUPS).to(tl.int64), head % GROUPS
    end = tl.load(filled)
    last = (end - 1) // BLOCK
    first = (part - 1) * BLOCK_N
    n, r, c = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R), tl.arange(0, CHUNK)
    inside = (n >= 0) & (n < tl.minimum(blocks, last + 1))
    rows = statistics + (head.to(tl.int64) * blocks + n) * WIDTH
    if WIDTH <= CHUNK:
        whole = tl.load(rows[:, None] + c[None, :], mask=inside[:, None] & (c < WIDTH)[None, :], other=0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if part == 0:
        index_block(
            last, b, group, head, end, keys, block_table, key_positions, channels, statistics, seen, labels, ranges,
            keys_b, keys_h, keys_s, positions_b, slots, blocks, host, KEY, CHANNELS, BLOCK, STATISTIC, HAS_BLOCKS,
            HAS_LABELS, HOST, BLOCK_K, HALF,
        )  # fmt: skip
    elif first <= last:
        of_rows = r < REPEAT
        heads_of = query + b * query_b + (group * REPEAT + r) * query_h
        # The last block's numbers are being written: it is always kept, and its score is no part of the choice.
        there = tl.load(seen + head * blocks + n, mask=inside, other=0) > 0
        found = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        if WIDTH <= CHUNK:
            q = _block_query(heads_of, of_rows, c, KEY, WIDTH, STATISTIC)
            found = tl.dot(whole, tl.trans(q.to(whole.dtype)), input_precision="ieee")
        else:
            for column in range(0, WIDTH, CHUNK):
                of_chunk = column + c
                wanted = inside[:, None] & (of_chunk < WIDTH)[None, :]
                s = tl.load(rows[:, None] + of_chunk[None, :], mask=wanted, other=0)
                q = _block_query(heads_of, of_rows, of_chunk, KEY, WIDTH, STATISTIC)
                found = tl.dot(s, tl.trans(q.to(s.dtype)), found, input_precision="ieee")
        score = _aggregated(found, of_rows, MAX)
        score = tl.where(n == last, float("inf"), tl.where(there, score, float("-inf")))
        tl.store(scores + (head * 2 + end % 2) * blocks + n, score, mask=inside)


@triton.jit
def _block_query(heads_of, of_rows, c, KEY: tl.constexpr, WIDTH: tl.constexpr, STATISTIC: tl.constexpr):
    """What the statistics of a block are multiplied with, [R, columns]."""
    q = tl.load(heads_of[:, None] + (c % KEY)[None, :], mask=of_rows[:, None] & (c < WIDTH)[None, :], other=0)
    if STATISTIC == 0:
        q = tl.where((c < KEY)[None, :], tl.minimum(q, 0), tl.maximum(q, 0))
    elif STATISTIC == 2:
        q = tl.where((c < KEY)[None, :], q, tl.abs(q))
    return q


@triton.jit
def _aggregated(found, of_rows, MAX: tl.constexpr):
    if MAX:
        return tl.max(tl.where(of_rows[None, :], found, float("-inf")), 1)
    else:
        return tl.sum(tl.where(of_rows[None, :], found, 0), 1)


@triton.jit
def _label_query(
    query, channels, b, group, query_b, query_h, REPEAT: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """The query's channels of a label, in halves [R, C/2], and their sum [R]."""
    half: tl.constexpr = CHANNELS // 2
    r, j = tl.arange(0, BLOCK_R), tl.arange(0, HALF)
    inside = (r < REPEAT)[:, None] & (j < half)[None, :]
    heads_of = query + b * query_b + (group * REPEAT + r) * query_h
    first_half = tl.load(channels + group * CHANNELS + j, mask=j < half, other=0)
    other_half = tl.load(channels + group * CHANNELS + half + j, mask=j < half, other=0)
    q0 = tl.load(heads_of[:, None] + first_half[None, :], mask=inside, other=0)
    q1 = tl.load(heads_of[:, None] + other_half[None, :], mask=inside, other=0)
    return q0, q1, tl.sum(q0.to(tl.float32), 1) + tl.sum(q1.to(tl.float32), 1)


@triton.jit
def _label_scores(
    q0, q1, q_sum, slot, visible, head, labels, ranges, slots, REPEAT: tl.constexpr, CHANNELS: tl.constexpr,
    MAX: tl.constexpr, BLOCK_R: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = CHANNELS // 2
    j = tl.arange(0, HALF)
    at = head.to(tl.int64) * slots + slot
    code = tl.load(labels + at[:, None] * half + j[None, :], mask=visible[:, None] & (j < half)[None, :], other=0)
    step = tl.load(ranges + at * 2, mask=visible, other=0).to(tl.float32)
    low = tl.load(ranges + at * 2 + 1, mask=visible, other=0).to(tl.float32)
    found = tl.dot((code & 15).to(q0.dtype), tl.trans(q0), input_precision="ieee")
    found = tl.dot((code >> 4).to(q0.dtype), tl.trans(q1), found, input_precision="ieee")
    found = found * step[:, None] + low[:, None] * q_sum[None, :]
    score = _aggregated(found, tl.arange(0, BLOCK_R) < REPEAT, MAX)
    return tl.where(visible, score, float("-inf"))


@triton.jit(do_not_specialize=["slots", "blocks"])
def _choose(
    query, filled, seen, scores, chosen_blocks, of_scores, channels, labels, ranges, key_positions, query_positions,
    query_b, query_h, positions_b, query_positions_b, slots, blocks, GROUPS: tl.constexpr, REPEAT: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, KEPT: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    PIPELINED: tl.constexpr, MAX: tl.constexpr, PDL: tl.constexpr, SPLITS: tl.constexpr, BLOCK_R: tl.constexpr,
    ALL: tl.constexpr, SHARE: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The chosen blocks, shared out to the programs of a head, and the scores of their tokens."""
    split, head = tl.program_id(0), tl.program_id(1)
    b, group = (head // GROUPS).to(tl.int64), head % GROUPS
    share: tl.constexpr = (KEPT + SPLITS - 1) // SPLITS
    begin = split * share
    stop = tl.minimum(begin + share, KEPT)
    q0, q1, q_sum = _label_query(query, channels, b, group, query_b, query_h, REPEAT, CHANNELS, BLOCK_R, HALF)
    end = tl.load(filled)
    now = tl.load(query_positions + b * query_positions_b)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    key = block_keys(end, head, seen, scores, blocks, BLOCK, SINK, RECENT, PIPELINED, ALL)
    chosen, rank, count = choose(key, KEPT)
    numbers = chosen_blocks + head * KEPT
    tl.store(numbers + rank, tl.arange(0, ALL), mask=chosen & (rank >= begin) & (rank < stop))
    rest = begin + tl.arange(0, SHARE)
    tl.store(numbers + rest, tl.full([SHARE], -1, tl.int32), mask=(rest < stop) & (rest >= count))
    tl.debug_barrier()
    of_scores += head.to(tl.int64) * KEPT * BLOCK
    for first in range(begin * BLOCK, stop * BLOCK, TILE):
        i = first + tl.arange(0, TILE)
        inside = i < stop * BLOCK
        n = tl.load(numbers + i // BLOCK, mask=inside, other=-1, cache_modifier=".cg")
        slot = n * BLOCK + i % BLOCK
        live = (n >= 0) & (slot < tl.minimum(end, slots))
        position = tl.load(key_positions + b * positions_b + slot, mask=live, other=-1)
        visible = (position >= 0) & (position <= now)
        score = _label_scores(
            q0, q1, q_sum, slot, visible, head, labels, ranges, slots, REPEAT, CHANNELS, MAX, BLOCK_R, HALF
        )
        tl.store(of_scores + i, score, mask=inside)


@triton.jit(do_not_specialize=["slots", "count"])
def _narrow(
    query, filled, old_scores, old_places, new_scores, new_places, channels, labels, ranges, key_positions,
    query_positions, query_b, query_h, positions_b, query_positions_b, slots, count, GROUPS: tl.constexpr,
    REPEAT: tl.constexpr, CHANNELS: tl.constexpr, KEEP: tl.constexpr, FIRST: tl.constexpr, MAX: tl.constexpr,
    PDL: tl.constexpr, BLOCK_R: tl.constexpr, ALL: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The best KEEP of ALL tokens; the first time their scores are computed, later read."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    b, group = (head // GROUPS).to(tl.int64), head % GROUPS
    place = tl.arange(0, ALL)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if FIRST:
        q0, q1, q_sum = _label_query(query, channels, b, group, query_b, query_h, REPEAT, CHANNELS, BLOCK_R, HALF)
        end = tl.minimum(tl.load(filled), slots)
        now = tl.load(query_positions + b * query_positions_b)
        old_scores += (head.to(tl.int64) * tl.num_programs(0) + chunk) * ALL
        for first in range(0, tl.maximum(tl.minimum(end - chunk * ALL, ALL), 0), TILE):
            i = first + tl.arange(0, TILE)
            slot = chunk * ALL + i
            position = tl.load(key_positions + b * positions_b + slot, mask=slot < end, other=-1)
            visible = (position >= 0) & (position <= now)
            score = _label_scores(
                q0, q1, q_sum, slot, visible, head, labels, ranges, slots, REPEAT, CHANNELS, MAX, BLOCK_R, HALF
            )
            tl.store(old_scores + i, score, mask=i < ALL)
        tl.debug_barrier()
        score = tl.load(old_scores + place, mask=chunk * ALL + place < end, other=float("-inf"), cache_modifier=".cg")
        where = chunk * ALL + place
    else:
        at = head.to(tl.int64) * count + chunk * ALL + place
        inside = chunk * ALL + place < count
        score = tl.load(old_scores + at, mask=inside, other=float("-inf"))
        where = tl.load(old_places + at, mask=inside, other=0)
    chosen, rank, kept = choose(tl.where(score > float("-inf"), in_order(score), NEVER), KEEP)
    out = (head.to(tl.int64) * tl.num_programs(0) + chunk) * KEEP
    tl.store(new_scores + out + rank, score, mask=chosen)
    tl.store(new_places + out + rank, where, mask=chosen)
    tl.store(new_scores + out + place, tl.full([ALL], float("-inf"), tl.float32), mask=(place >= kept) & (place < KEEP))
