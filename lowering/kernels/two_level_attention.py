"""Triton kernels of `effpass::two_level_attention`: two-level sparse attention of one token in three launches.

    score    scores all blocks by their statistics; extra programs per KV head enter the new key into the index
    choose   chooses the top-k blocks, then scores their tokens by their labels
    attend   chooses the top-k tokens and attends to them (:mod:`effpass.lowering.kernels.chosen_attention`)

If whole blocks are attended to, `choose` is omitted. If all tokens are candidates, `narrow` replaces it: it keeps the
best of every 8192 tokens, repeatedly, until at most 16384 are left. The equations are those of
:mod:`effpass.lowering.ops.two_level_attention`; all scores are float32.

A step is short, so its time is that of the longest program. There are therefore as many programs as the device holds,
with many warps each, and the queries of heads that share a KV head are summed before anything is multiplied. (If the
maximum of their scores is wanted instead, they are the columns of a matrix product.) Every program that needs a choice
makes it itself, which takes no longer than one program would, and no program waits for another. Before it waits for the
preceding launch, a launch only reads what earlier ones have completed: the query (for which `score` waits), `seen`, and
in `score` the statistics, which are left from the step before.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.chosen_attention import (
    BLOCKS,
    LISTED,
    TILING,
    TOKENS,
    Tiling,
    attend_chosen,
    beside,
    block_keys,
    fits,
    forced_blocks,
    grid_of,
    unit_of,
)
from effpass.lowering.kernels.key_index import STATISTICS, index_token, indexable, label_shape, strides
from effpass.lowering.kernels.key_labels import label_query, label_scores, write_wanted
from effpass.lowering.kernels.largest import MOST, NEVER, cut, in_order, ranks, write_share
from effpass.lowering.kernels.launch import launch_options, multiprocessors, overlaps

__all__ = ["supported", "two_level_attention"]

_NARROWED = 8192  # tokens among which one program of `narrow` chooses
_LABELLED = 16384  # bytes of labels that one program scores at once


def supported(
    query: Tensor, keys: Tensor, values: Tensor, channels: Tensor, labels: Tensor, seen: Tensor, chosen_blocks: Tensor,
    chosen_tokens: Tensor, block: int,
) -> bool:  # fmt: skip
    """Return whether the kernels support `query` [B, H, 1, K].

    There may be up to 16384 blocks, and up to 16384 tokens in the chosen blocks. If all tokens are candidates, up to
    4096 can be chosen.
    """
    kept, tokens = chosen_blocks.shape[2], chosen_tokens.shape[2]
    candidates = kept * block if kept and tokens else 0
    return (
        indexable(keys, channels, labels)
        and fits(query, keys, values, channels.shape[0])
        and max(seen.shape[2], candidates) <= MOST
        and (kept > 0 or tokens <= _NARROWED // 2)
    )


def two_level_attention(
    query: Tensor, keys: Tensor, values: Tensor, block_table: Tensor | None, host: Tensor | None,
    key_positions: Tensor, query_positions: Tensor, filled: Tensor, channels: Tensor, statistics: Tensor, seen: Tensor,
    labels: Tensor, ranges: Tensor, scores: Tensor, chosen_blocks: Tensor, chosen_tokens: Tensor, scale: float,
    softcap: float, block: int, sink: int, recent: int, statistic: str, aggregation: str, is_pipelined: bool,
    how: Tiling = TILING,
) -> Tensor:  # fmt: skip
    """Run `effpass::two_level_attention` on tensors that are :func:`supported`; `how` overrides the tiling."""
    (batch, heads, _, key_size), (groups, of_label) = query.shape, channels.shape
    device, slots, repeat, of_heads = query.device, key_positions.shape[1], heads // groups, batch * groups
    query = query if query.stride(-1) == 1 else query.contiguous()
    blocks, kept, tokens = triton.cdiv(slots, block), chosen_blocks.shape[2], chosen_tokens.shape[2]
    is_max, pdl, processors = aggregation == "max", overlaps(device), multiprocessors(device)
    # A matrix product needs at least 16 columns.
    block_r = triton.next_power_of_2(repeat) if not is_max else max(16, triton.next_power_of_2(repeat))
    shape, common = label_shape(of_label, key_size), {"GROUPS": groups, "REPEAT": repeat, "BLOCK_R": block_r}
    common |= {"CHANNELS": of_label, "MAX": is_max, "PDL": pdl}
    of_query = (query.stride(0), query.stride(1))
    cached = (*strides(keys, block_table), key_positions.stride(0))

    width = statistics.shape[3] * key_size
    main = 1 << (key_size.bit_length() - 1)
    rest = 0 if main == key_size else max(16, triton.next_power_of_2(key_size - main))
    row_bytes = width * statistics.element_size()
    block_n = max(16 if is_max else 4, 1 << (how.scored // row_bytes).bit_length() - 1) if kept else 16
    num_warps = 16 if block_n * width > 8192 else 8
    tiles = triton.cdiv(blocks, block_n) if kept else 0
    # A program sums the query heads once for all its tiles, so it should process several.
    scoring = min(tiles, max(1, how.scoring // num_warps * processors // of_heads))
    entering = triton.cdiv(key_size, shape["BLOCK_K"]) if kept else 1
    wanted = None if is_max or not tokens else query.new_empty((of_heads, of_label), dtype=torch.float32)
    _score[(scoring + entering, of_heads)](
        query, keys, block_table, key_positions, filled, channels, statistics, seen, labels, ranges, scores, wanted,
        *of_query, *cached, slots, blocks, host, **common, KEY=key_size, BLOCK=block, STATISTIC=STATISTICS[statistic],
        HAS_BLOCKS=kept > 0, HAS_LABELS=tokens > 0, HOST=0 if host is None else host.shape[-1], ENTERING=entering,
        BLOCK_N=block_n, MAIN=main, REST=rest, **shape, **launch_options(device, num_warps),
    )  # fmt: skip
    of_scores = slots_of = None
    of_labels = (wanted, channels, labels, ranges, key_positions, query_positions)
    at_once = max(64, _LABELLED // shape["HALF"])  # tokens whose labels a program scores at once
    if kept and tokens:
        kind, candidates, limit = TOKENS, kept * block, tokens
        of_scores = torch.empty((of_heads, candidates), dtype=torch.float32, device=device)
        unit = unit_of(blocks)
        programs = 1 if is_max or 8 * of_heads <= processors else how.choose.together
        splits = min(kept, max(1, programs * processors // of_heads))
        share = triton.next_power_of_2(triton.cdiv(kept, splits))
        rows, columns = grid_of(blocks)
        _choose[(splits, of_heads)](
            query, filled, seen, scores, chosen_blocks, of_scores, *of_labels, *of_query, key_positions.stride(0),
            query_positions.stride(0), slots, blocks // unit, **common, BLOCK=block, KEPT=kept, SINK=sink,
            RECENT=recent, PIPELINED=is_pipelined, UNIT=unit, SPLITS=splits, ROWS=rows, COLUMNS=columns, SHARE=share,
            HALF=shape["HALF"], TILE=min(share * block, at_once),
            **beside(programs, device, 8 if rows * columns <= 512 else how.choose.warps(programs)),
        )  # fmt: skip
    elif kept:
        kind, candidates, limit = BLOCKS, blocks, kept
    else:
        kind, limit = LISTED, tokens
        of_scores, slots_of = _narrow_all(query, filled, of_labels, tokens, slots, common, shape["HALF"], at_once)
        candidates = of_scores.shape[1]
    return attend_chosen(
        query, keys, values, block_table, host, key_positions, query_positions, filled, chosen_blocks, chosen_tokens,
        of_scores, slots_of, seen, scores, scale, softcap, block, sink, recent, is_pipelined, kind, candidates, limit,
        how,
    )  # fmt: skip


def _narrow_all(
    query: Tensor, filled: Tensor, of_labels: tuple[Any, ...], tokens: int, slots: int, common: dict[str, Any],
    half: int, at_once: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return scores and slots [B G, L] of up to 16384 candidates, which include the best `tokens` of all tokens."""
    _, channels, _, _, key_positions, query_positions = of_labels
    of_heads, device = query.shape[0] * channels.shape[0], query.device
    rows, columns = grid_of(_NARROWED)
    count, before, places = slots, None, None
    while True:
        chunks = triton.cdiv(count, _NARROWED)
        new_scores = torch.empty((of_heads, chunks * tokens), dtype=torch.float32, device=device)
        new_places = torch.empty((of_heads, chunks * tokens), dtype=torch.int32, device=device)
        is_first = before is None
        scratch = (
            torch.empty((of_heads, chunks * _NARROWED), dtype=torch.float32, device=device) if is_first else before
        )
        _narrow[(chunks, of_heads)](
            query, filled, scratch, places, new_scores, new_places, *of_labels, query.stride(0), query.stride(1),
            key_positions.stride(0), query_positions.stride(0), slots, count, **common, KEEP=tokens, FIRST=is_first,
            ROWS=rows, COLUMNS=columns, HALF=half, TILE=at_once, **launch_options(device, 16),
        )  # fmt: skip
        before, places, count = new_scores, new_places, chunks * tokens
        if count <= MOST:
            return before, places


# -- blocks -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["slots", "blocks"])
def _score(
    query, keys, block_table, key_positions, filled, channels, statistics, seen, labels, ranges, scores, wanted,
    query_b, query_h, keys_b, keys_h, keys_s, positions_b, slots, blocks, host, GROUPS: tl.constexpr,
    REPEAT: tl.constexpr, BLOCK_R: tl.constexpr, CHANNELS: tl.constexpr, MAX: tl.constexpr, PDL: tl.constexpr,
    KEY: tl.constexpr, BLOCK: tl.constexpr, STATISTIC: tl.constexpr, HAS_BLOCKS: tl.constexpr, HAS_LABELS: tl.constexpr,
    HOST: tl.constexpr, ENTERING: tl.constexpr, BLOCK_N: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    HALF: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The first programs of a head enter the new key, the others score blocks."""
    part, head = tl.program_id(0), tl.program_id(1)
    b, group = (head // GROUPS).to(tl.int64), head % GROUPS
    end = tl.load(filled)
    if part < ENTERING:
        index_token(
            part, b, group, head, end, keys, block_table, key_positions, channels, statistics, seen, labels, ranges,
            keys_b, keys_h, keys_s, positions_b, slots, blocks, host, KEY, CHANNELS, BLOCK, STATISTIC, HAS_BLOCKS,
            HAS_LABELS, HOST, PDL, HALF, BLOCK_K,
        )  # fmt: skip
        if wanted is not None:  # noqa: SIM102  (resolved when the kernel is compiled)
            if part == 0:
                write_wanted(wanted, query, channels, b, group, head, query_b, query_h, REPEAT, BLOCK_R, CHANNELS, HALF)
    elif HAS_BLOCKS:
        last = (end - 1) // BLOCK
        r, c = tl.arange(0, BLOCK_R), tl.arange(0, MAIN)
        of_rest = MAIN + tl.arange(0, REST if REST > 0 else 1)
        width: tl.constexpr = KEY if STATISTIC == 1 else 2 * KEY
        stop = tl.minimum(blocks, last + 1)
        statistics += head.to(tl.int64) * blocks * width
        n = (part - ENTERING) * BLOCK_N + tl.arange(0, BLOCK_N)
        first, second = _rows(statistics, n, stop, c, KEY, STATISTIC)
        rest, second_rest = first, first
        if REST > 0:
            rest, second_rest = _rows(statistics, n, stop, of_rest, KEY, STATISTIC)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        heads_of = query + b * query_b + (group * REPEAT + r) * query_h
        weight, other = _weights(heads_of, r < REPEAT, c, KEY, STATISTIC, MAX)
        if REST > 0:
            weight_rest, other_rest = _weights(heads_of, r < REPEAT, of_rest, KEY, STATISTIC, MAX)
        step = (tl.num_programs(0) - ENTERING) * BLOCK_N
        for _ in range((part - ENTERING) * BLOCK_N, stop, step):
            # The statistics of the last block are being written now; it is always kept, so its score is not needed.
            there = tl.load(seen + head * blocks + n, mask=n < tl.minimum(stop, last), other=0) > 0
            score = _products(first, second, weight, other, STATISTIC, MAX)
            if REST > 0:
                score += _products(rest, second_rest, weight_rest, other_rest, STATISTIC, MAX)
            if MAX:
                score = tl.max(tl.where((r < REPEAT)[None, :], score, float("-inf")), 1)
            score = tl.where(n == last, float("inf"), tl.where(there, score, float("-inf")))
            tl.store(scores + (head * 2 + end % 2) * blocks + n, score, mask=n < stop)
            n += step
            first, second = _rows(statistics, n, stop, c, KEY, STATISTIC)
            if REST > 0:
                rest, second_rest = _rows(statistics, n, stop, of_rest, KEY, STATISTIC)


@triton.jit
def _rows(statistics, n, stop, c, KEY: tl.constexpr, STATISTIC: tl.constexpr):
    """The columns `c` of both statistics of blocks `n` [N, C]; twice the one where there is one."""
    width: tl.constexpr = KEY if STATISTIC == 1 else 2 * KEY
    at, mask = statistics + n.to(tl.int64)[:, None] * width + c[None, :], (n < stop)[:, None] & (c < KEY)[None, :]
    first = tl.load(at, mask=mask, other=0)
    second = first
    if STATISTIC != 1:
        second = tl.load(at + KEY, mask=mask, other=0)
    return first, second


@triton.jit
def _weights(heads_of, of_rows, c, KEY: tl.constexpr, STATISTIC: tl.constexpr, MAX: tl.constexpr):
    """What both statistics count at the columns `c`: summed over the query heads [C], or of each [R, C] where MAX."""
    q = tl.load(heads_of[:, None] + c[None, :], mask=of_rows[:, None] & (c < KEY)[None, :], other=0)
    if not MAX:
        q = q.to(tl.float32)
    other = tl.maximum(q, 0) if STATISTIC == 0 else tl.abs(q)
    if STATISTIC == 0:
        q = tl.minimum(q, 0)
    if MAX:
        return q, other
    else:
        return tl.sum(q, 0), tl.sum(other, 0)


@triton.jit
def _products(first, second, weight, other, STATISTIC: tl.constexpr, MAX: tl.constexpr):
    """Scores of blocks [N] by some columns of their statistics [N, C], or by query head [N, R]."""
    if MAX:
        found = tl.dot(first, tl.trans(weight.to(first.dtype)), input_precision="ieee")
        if STATISTIC != 1:
            found = tl.dot(second, tl.trans(other.to(first.dtype)), found, input_precision="ieee")
        return found
    else:
        found = first.to(tl.float32) * weight[None, :]
        if STATISTIC != 1:
            found += second.to(tl.float32) * other[None, :]
        return tl.sum(found, 1)


# -- tokens ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["slots", "blocks"])
def _choose(
    query, filled, seen, scores, chosen_blocks, of_scores, wanted, channels, labels, ranges, key_positions,
    query_positions, query_b, query_h, positions_b, query_positions_b, slots, blocks, GROUPS: tl.constexpr,
    REPEAT: tl.constexpr, BLOCK_R: tl.constexpr, CHANNELS: tl.constexpr, MAX: tl.constexpr, PDL: tl.constexpr,
    BLOCK: tl.constexpr, KEPT: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, PIPELINED: tl.constexpr,
    UNIT: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHARE: tl.constexpr,
    HALF: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The chosen blocks, shared out to the programs of a head, and the scores of their tokens."""
    split, head = tl.program_id(0), tl.program_id(1)
    b, group = (head // GROUPS).to(tl.int64), head % GROUPS
    blocks *= UNIT
    share: tl.constexpr = (KEPT + SPLITS - 1) // SPLITS
    begin = split * share
    stop = tl.minimum(begin + share, KEPT)
    end = tl.load(filled)
    now = tl.load(query_positions + b * query_positions_b)
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    there, forced = forced_blocks(place, end, head, seen, blocks, BLOCK, SINK, RECENT)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    q0, q1, q_sum = label_query(
        wanted, query, channels, b, group, head, query_b, query_h, REPEAT, BLOCK_R, CHANNELS, MAX, HALF
    )  # fmt: skip
    key = block_keys(place, there, forced, end, head, seen, scores, blocks, BLOCK, PIPELINED)
    chosen, count = cut(key, place, KEPT, ROWS * COLUMNS)
    numbers = chosen_blocks + head * KEPT
    write_share(numbers, chosen, place, begin, stop, count, SHARE)
    of_scores += head.to(tl.int64) * KEPT * BLOCK
    if TILE >= SHARE * BLOCK:
        _score_tokens(
            begin * BLOCK, stop * BLOCK, numbers, of_scores, q0, q1, q_sum, now, b, head, end, labels, ranges,
            key_positions, positions_b, slots, REPEAT, BLOCK_R, CHANNELS, MAX, BLOCK, HALF, TILE,
        )  # fmt: skip
    else:
        for first in range(begin * BLOCK, stop * BLOCK, TILE):
            _score_tokens(
                first, stop * BLOCK, numbers, of_scores, q0, q1, q_sum, now, b, head, end, labels, ranges,
                key_positions, positions_b, slots, REPEAT, BLOCK_R, CHANNELS, MAX, BLOCK, HALF, TILE,
            )  # fmt: skip


@triton.jit
def _score_tokens(
    first, stop, numbers, of_scores, q0, q1, q_sum, now, b, head, end, labels, ranges, key_positions, positions_b,
    slots, REPEAT: tl.constexpr, BLOCK_R: tl.constexpr, CHANNELS: tl.constexpr, MAX: tl.constexpr, BLOCK: tl.constexpr,
    HALF: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Those of places `first` to `stop` among the tokens of the blocks `numbers`."""
    i = first + tl.arange(0, TILE)
    n = tl.load(numbers + i // BLOCK, mask=i < stop, other=-1, cache_modifier=".cg")
    slot = n * BLOCK + i % BLOCK
    live = (n >= 0) & (slot < tl.minimum(end, slots))
    position = tl.load(key_positions + b * positions_b + slot, mask=live, other=-1)
    score = label_scores(q0, q1, q_sum, slot, live, head, labels, ranges, slots, REPEAT, BLOCK_R, CHANNELS, MAX, HALF)
    score = tl.where((position >= 0) & (position <= now), score, float("-inf"))
    tl.store(of_scores + i, score, mask=i < stop)


@triton.jit(do_not_specialize=["slots", "count"])
def _narrow(
    query, filled, old_scores, old_places, new_scores, new_places, wanted, channels, labels, ranges, key_positions,
    query_positions, query_b, query_h, positions_b, query_positions_b, slots, count, GROUPS: tl.constexpr,
    REPEAT: tl.constexpr, BLOCK_R: tl.constexpr, CHANNELS: tl.constexpr, MAX: tl.constexpr, PDL: tl.constexpr,
    KEEP: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The best KEEP of some thousand tokens; the first time their scores are computed, later read."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    b, group = (head // GROUPS).to(tl.int64), head % GROUPS
    many: tl.constexpr = ROWS * COLUMNS
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if FIRST:
        q0, q1, q_sum = label_query(
            wanted, query, channels, b, group, head, query_b, query_h, REPEAT, BLOCK_R, CHANNELS, MAX, HALF
        )  # fmt: skip
        end = tl.minimum(tl.load(filled), slots)
        now = tl.load(query_positions + b * query_positions_b)
        old_scores += (head.to(tl.int64) * tl.num_programs(0) + chunk) * many
        for first in range(0, tl.maximum(tl.minimum(end - chunk * many, many), 0), TILE):
            i = first + tl.arange(0, TILE)
            slot = chunk * many + i
            position = tl.load(key_positions + b * positions_b + slot, mask=slot < end, other=-1)
            score = label_scores(
                q0, q1, q_sum, slot, slot < end, head, labels, ranges, slots, REPEAT, BLOCK_R, CHANNELS, MAX, HALF
            )  # fmt: skip
            score = tl.where((position >= 0) & (position <= now), score, float("-inf"))
            tl.store(old_scores + i, score, mask=i < many)
        tl.debug_barrier()
        score = tl.load(old_scores + place, mask=chunk * many + place < end, other=float("-inf"), cache_modifier=".cg")
        where = chunk * many + place
    else:
        at = head.to(tl.int64) * count + chunk * many + place
        inside = chunk * many + place < count
        score = tl.load(old_scores + at, mask=inside, other=float("-inf"))
        where = tl.load(old_places + at, mask=inside, other=0)
    key = tl.where(score > float("-inf"), in_order(score), NEVER)
    chosen, kept = cut(key, place, KEEP, many)
    rank = ranks(chosen)
    out = (head.to(tl.int64) * tl.num_programs(0) + chunk) * KEEP
    tl.store(new_scores + out + rank, score, mask=chosen)
    tl.store(new_places + out + rank, where, mask=chosen)
    none = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    tl.store(new_scores + out + place, none, mask=(place >= kept) & (place < KEEP))
