"""Attention of one token over chosen slots: the last launch of `two_level_attention`, and dense attention over latents.

Each program of a head finds out what is chosen, writes its share of it down in order, and attends to that share with
a running softmax; the last one to finish merges all. Over latents (MLA) there is one key for many query heads, and what
programs leave to be merged is as large as what they read: there the query heads are shared out too.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.decode_attention import _merge, _store
from effpass.lowering.kernels.largest import FORCED, NEVER, choose, in_order
from effpass.lowering.kernels.launch import counters, launch_options, multiprocessors, overlaps

__all__ = ["BLOCKS", "DENSE", "LISTED", "TOKENS", "attend_chosen", "block_keys", "fits", "is_latent"]

# What a program chooses among: blocks; tokens of the blocks of a list; tokens of a list; nothing, it attends to all.
BLOCKS, TOKENS, LISTED, DENSE = (tl.constexpr(i) for i in range(4))


def is_latent(keys: Tensor, values: Tensor) -> bool:
    """Whether values are the first channels of the keys."""
    return (
        values.data_ptr() == keys.data_ptr()
        and values.stride() == keys.stride()
        and values.shape[-1] < keys.shape[-1]
        and triton.next_power_of_2(values.shape[-1]) == values.shape[-1] >= 16
    )


def fits(query: Tensor, keys: Tensor, values: Tensor, groups: int) -> bool:
    """Whether there is a kernel for `query` [B, H, 1, K]: one type, heads up to 256, or latents of up to 512 + 128."""
    (_, heads, _, key_size), value_size = query.shape, values.shape[-1]
    is_small = key_size <= 256 and value_size <= 256 and heads // groups <= 32
    return (
        query.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and keys.dtype == values.dtype == query.dtype
        and keys.stride(-1) == values.stride(-1) == 1
        and key_size >= 16
        and value_size >= 16
        and (is_small or (is_latent(keys, values) and value_size <= 512 and key_size - value_size <= 128))
    )


def attend_chosen(
    query: Tensor, keys: Tensor, values: Tensor, block_table: Tensor | None, host: Tensor | None,
    key_positions: Tensor, query_positions: Tensor, filled: Tensor, chosen_blocks: Tensor | None,
    chosen_tokens: Tensor | None, of_scores: Tensor | None, places: Tensor | None, seen: Tensor | None,
    scores: Tensor | None, scale: float, softcap: float, block: int, sink: int, recent: int, is_pipelined: bool,
    kind: tl.constexpr, candidates: int, limit: int,
) -> Tensor:  # fmt: skip
    """[B, 1, H, V] of `query` [B, H, 1, K] with contiguous last dimension.

    Args:
        query: and what follows as in `effpass::two_level_attention`, up to `chosen_tokens`.
        of_scores: float32 [B G, candidates], of tokens.
        places: int32 [B G, candidates], their slots where `kind` is LISTED.
        seen: int32 [B, G, N], where blocks are chosen; so are `scores`.
        scores: float32 [B, G, 2, N].
        kind: what is chosen among.
        candidates: how many there are; for DENSE the slots.
        limit: how many blocks or tokens are chosen; chosen_blocks or chosen_tokens have that many places.
    """
    (batch, heads, _, key_size), value_size = query.shape, values.shape[-1]
    groups = keys.shape[1] if block_table is None else block_table.shape[1]
    device, slots = query.device, key_positions.shape[1]
    latent = is_latent(keys, values)
    is_dense, unit = kind is DENSE, block if kind is BLOCKS else 1
    reads = candidates if is_dense else limit * unit
    rows, splits = shares(
        heads // groups, reads, (key_size if latent else key_size + value_size) * query.element_size(), value_size,
        batch * groups, multiprocessors(device), is_dense,
    )  # fmt: skip
    parts_of, of_rows = heads // groups // rows, batch * (heads // rows)
    out = query.new_empty((batch, 1, heads, value_size))
    block_r = max(16, triton.next_power_of_2(rows))
    live, block_v = triton.next_power_of_2(rows), max(16, triton.next_power_of_2(value_size))
    parts = sums = done = None
    if splits > 1:
        parts = query.new_empty((of_rows, splits, rows, value_size), dtype=torch.float32)
        sums = query.new_empty((of_rows, splits, 2, rows), dtype=torch.float32)
        done = None if is_dense else counters(device, of_rows)
    at = keys.stride()[:3] if block_table is None else (keys.stride(0), 0, keys.stride(1))
    of_values = values.stride()[:3] if block_table is None else (values.stride(0), 0, values.stride(1))
    wide = max(key_size, value_size) * query.element_size() > 512
    _attend[(splits, of_rows)](
        query, keys, values, block_table, key_positions, query_positions, filled, chosen_blocks, chosen_tokens,
        of_scores, places, seen, scores, out, parts, sums, done, query.stride(0), query.stride(1), *at, *of_values,
        key_positions.stride(0), query_positions.stride(0), slots, triton.cdiv(slots, block), candidates, scale,
        softcap, host, GROUPS=groups, PARTS_OF=parts_of, REPEAT=rows, KEY=value_size if latent else key_size,
        HOST=0 if host is None else host.shape[-1],
        REST=key_size - value_size if latent else 0, VALUE=value_size, LATENT=latent, KIND=kind.value, LIMIT=limit,
        BLOCK=block, SINK=sink, RECENT=recent, PIPELINED=is_pipelined, SOFTCAP=softcap != 0, SPLITS=splits,
        KEPT=0 if chosen_blocks is None else chosen_blocks.shape[2], PDL=overlaps(device),
        ALL=16 if is_dense else triton.next_power_of_2(max(candidates, 16)),
        SHARE=16 if is_dense else triton.next_power_of_2(triton.cdiv(limit, splits)), BLOCK_R=block_r, LIVE=live,
        BLOCK_N=32 if wide else 64, BLOCK_K=block_v if latent else max(16, triton.next_power_of_2(key_size)),
        BLOCK_REST=max(16, triton.next_power_of_2(key_size - value_size)) if latent else 16, BLOCK_V=block_v,
        BLOCK_S=max(1, min(32, 8192 // (live * block_v))),
        # Slots come from a list, and pages from a table by them: 7 stages are two or three tiles under way.
        **launch_options(device, 8, 3 if is_dense else 7),
    )  # fmt: skip
    if is_dense and splits > 1:
        width = min(max(16, 8192 // triton.next_power_of_2(splits)), block_v, 128)
        _combine[(batch * heads, triton.cdiv(value_size, width))](
            out, parts, sums, SPLITS=splits, ROWS=rows, VALUE=value_size, PDL=overlaps(device),
            BLOCK_S=triton.next_power_of_2(splits), BLOCK_V=width, **launch_options(device, 4),
        )  # fmt: skip
    return out


@functools.cache
def shares(
    repeat: int, reads: int, row_bytes: int, value_size: int, heads: int, processors: int, is_dense: bool
) -> tuple[int, int]:
    """Query heads of a program, and programs that share the keys of a head.

    A program reads `reads / splits` rows, and the last one `splits` parts of float32: their sum is made small, with all
    programs at once on the device where that is possible. Dense attention merges its parts in a launch of its own.
    """
    most = 32 if value_size > 256 else 64
    best: tuple[float, int, int] | None = None
    for rows in (r for r in range(1, repeat + 1) if repeat % r == 0 and r <= most):
        programs = heads * (repeat // rows)
        room = max(1, processors // programs)
        for splits in sorted({1 << i for i in range(10) if 1 << i <= room} | {room}):
            splits = min(splits, triton.cdiv(reads, 64))
            waves = triton.cdiv(programs * splits, processors)
            merged = 0 if is_dense or splits == 1 else splits * rows * value_size * 4
            again = programs * reads * row_bytes / processors * 0.25  # of all programs together, out of a cache
            cost = max(waves * reads * row_bytes / splits, again) + merged
            if best is None or cost < best[0]:
                best = (cost, rows, splits)
    assert best is not None
    return best[1], best[2]


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def block_keys(
    end, head, seen, scores, blocks, BLOCK: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    PIPELINED: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """What blocks are chosen by, int32 [ALL]."""
    n, last = tl.arange(0, ALL), (end - 1) // BLOCK
    now = (n <= last) & (n < blocks)
    which = end % 2
    if PIPELINED:
        which = 1 - which
    score = tl.load(scores + (head * 2 + which) * blocks + n, mask=now, other=float("-inf"))
    there = tl.load(seen + head * blocks + n, mask=now, other=0) > 0
    forced = (tl.cumsum(there.to(tl.int32), 0) <= SINK) | (n > last - RECENT)
    key = tl.where(score > float("-inf"), tl.minimum(in_order(score), FORCED - 1), NEVER)
    return tl.where(there, tl.where(forced, FORCED, key), NEVER)


@triton.jit(do_not_specialize=["slots", "blocks", "candidates"])
def _attend(
    query, keys, values, block_table, key_positions, query_positions, filled, chosen_blocks, chosen_tokens, of_scores,
    places, seen, scores, out, parts, sums, done, query_b, query_h, keys_b, keys_h, keys_s, values_b, values_h,
    values_s, positions_b, query_positions_b, slots, blocks, candidates, scale, softcap, host, GROUPS: tl.constexpr,
    PARTS_OF: tl.constexpr, REPEAT: tl.constexpr, KEY: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr,
    HOST: tl.constexpr, LATENT: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr,
    SINK: tl.constexpr, RECENT: tl.constexpr, PIPELINED: tl.constexpr, SOFTCAP: tl.constexpr, SPLITS: tl.constexpr,
    KEPT: tl.constexpr, PDL: tl.constexpr, ALL: tl.constexpr, SHARE: tl.constexpr, BLOCK_R: tl.constexpr,
    LIVE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    split, part = tl.program_id(0), tl.program_id(1)
    head = part // PARTS_OF  # the key-value head of a row
    b, group = (head // GROUPS).to(tl.int64), head % GROUPS
    r, dk, dv, span = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    live = r < REPEAT
    if PDL and KIND == DENSE:
        gdc_wait()
        gdc_launch_dependents()
    of_heads = query + b * query_b + (part % (GROUPS * PARTS_OF) * REPEAT + r) * query_h
    q = tl.load(of_heads[:, None] + dk[None, :], mask=live[:, None] & (dk < KEY)[None, :], other=0)
    if REST > 0:
        dr = tl.arange(0, BLOCK_REST)
        q_rest = tl.load(of_heads[:, None] + (KEY + dr)[None, :], mask=live[:, None] & (dr < REST)[None, :], other=0)
    end = tl.minimum(tl.load(filled), slots)
    now = tl.load(query_positions + b * query_positions_b)
    key_positions += b * positions_b
    if PDL and KIND != DENSE:  # the launches in front have waited for the query
        gdc_wait()
        gdc_launch_dependents()

    # This program's share, from `begin` to `stop`: in units of what is chosen, then in slots.
    if KIND == DENSE:
        share = tl.cdiv(tl.cdiv(end, SPLITS), BLOCK_N) * BLOCK_N
        active = tl.maximum(tl.cdiv(end, tl.maximum(share, 1)), 1)
        begin = split * share
        stop = tl.minimum(begin + share, end)
        chosen_list = chosen_tokens
    else:
        per: tl.constexpr = (LIMIT + SPLITS - 1) // SPLITS
        place = tl.arange(0, ALL)
        if KIND == BLOCKS:
            key = block_keys(end, head, seen, scores, blocks, BLOCK, SINK, RECENT, PIPELINED, ALL)
        else:
            base = head.to(tl.int64) * candidates + place
            graded = tl.load(of_scores + base, mask=place < candidates, other=float("-inf"))
            key = tl.where(graded > float("-inf"), in_order(graded), NEVER)
        chosen, rank, count = choose(key, LIMIT)
        active = tl.maximum(tl.cdiv(count, per), 1)
        begin = split * per
        stop = tl.minimum(begin + per, LIMIT)
        mine = chosen & (rank >= begin) & (rank < stop)
        if KIND == BLOCKS:
            chosen_list = chosen_blocks + head * LIMIT
            written = place
        else:
            chosen_list = chosen_tokens + head * LIMIT
            if KIND == TOKENS:
                number = tl.load(chosen_blocks + head * KEPT + place // BLOCK, mask=mine, other=0)
                written = number * BLOCK + place % BLOCK
            else:
                written = tl.load(places + base, mask=mine, other=0)
        tl.store(chosen_list + rank, written, mask=mine)
        rest = begin + tl.arange(0, SHARE)
        tl.store(chosen_list + rest, tl.full([SHARE], -1, tl.int32), mask=(rest < stop) & (rest >= count))
        tl.debug_barrier()
        stop = tl.minimum(stop, count)
        if KIND == BLOCKS:
            begin *= BLOCK
            stop *= BLOCK

    if split < active:
        if block_table is None:
            keys += b * keys_b + group * keys_h
            values += b * values_b + group * values_h
        best = tl.full([BLOCK_R], -1e30, tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        sum_v = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
        for first in range(begin, stop, BLOCK_N):
            i = first + span
            reach = i < stop
            if KIND == DENSE:
                slot = i
            elif KIND == BLOCKS:
                slot = tl.load(chosen_list + i // BLOCK, mask=reach, other=0, cache_modifier=".cg") * BLOCK + i % BLOCK
                reach = reach & (slot < end)
            else:
                slot = tl.load(chosen_list + i, mask=reach, other=0, cache_modifier=".cg")
            there = reach
            if KIND != TOKENS and KIND != LISTED:
                position = tl.load(key_positions + slot, mask=reach, other=-1)
                there = (position >= 0) & (position <= now)
            if block_table is None:
                of_k, of_v = keys + slot.to(tl.int64) * keys_s, values + slot.to(tl.int64) * values_s
            else:
                page = tl.load(block_table + head * blocks + slot // BLOCK, mask=reach, other=0).to(tl.int64)
                of_k = keys + (page * keys_b + slot % BLOCK * keys_s)
                of_v = values + (page * values_b + slot % BLOCK * values_s)
                if host is not None:  # through the bus
                    far = host + (head.to(tl.int64) * blocks * BLOCK + slot) * HOST
                    of_k = tl.where(page >= 0, of_k, far)
                    of_v = tl.where(page >= 0, of_v, far if LATENT else far + KEY)
            k = tl.load(of_k[:, None] + dk[None, :], mask=reach[:, None] & (dk < KEY)[None, :], other=0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
            if REST > 0:
                of_rest = of_k[:, None] + (KEY + dr)[None, :]
                k_rest = tl.load(of_rest, mask=reach[:, None] & (dr < REST)[None, :], other=0)
                score = tl.dot(q_rest, tl.trans(k_rest), score, input_precision="ieee")
            if LATENT:
                v = k
            else:
                v = tl.load(of_v[:, None] + dv[None, :], mask=reach[:, None] & (dv < VALUE)[None, :], other=0)
            if SOFTCAP:
                score = softcap * 1.4426950408889634 * (1 - 2 / (tl.exp(score * (2 * scale / softcap)) + 1))
            else:
                score = score * (scale * 1.4426950408889634)
            score = tl.where(there[None, :], score, float("-inf"))
            higher = tl.maximum(best, tl.max(score, 1))
            weight = tl.exp2(score - higher[:, None])
            fade = tl.exp2(best - higher)
            total = total * fade + tl.sum(weight, 1)
            sum_v = tl.dot(weight.to(v.dtype), v, sum_v * fade[:, None], input_precision="ieee")
            best = higher
        heads: tl.constexpr = GROUPS * PARTS_OF * REPEAT
        of_part = part % (GROUPS * PARTS_OF)
        if SPLITS == 1:
            _store(out, sum_v, total, b, of_part, r, live, 1, dv, heads, REPEAT, VALUE)
        elif KIND == DENSE:
            at = (part * SPLITS + split).to(tl.int64) * REPEAT + r
            inside = live[:, None] & (dv < VALUE)[None, :]
            tl.store(parts + at[:, None] * VALUE + dv[None, :], sum_v, mask=inside)
            tl.store(sums + (part * SPLITS + split) * 2 * REPEAT + r, best, mask=live)
            tl.store(sums + ((part * SPLITS + split) * 2 + 1) * REPEAT + r, total, mask=live)
        else:
            if active == 1:
                _store(out, sum_v, total, b, of_part, r, live, 1, dv, heads, REPEAT, VALUE)
            else:
                _merge(
                    out, sum_v, total, best, parts, sums, done, split, part, active, b, of_part, r, live, 1, dv, heads,
                    REPEAT, VALUE, SPLITS, LIVE, BLOCK_V, BLOCK_S,
                )  # fmt: skip
    elif KIND == DENSE:
        tl.store(sums + ((part * SPLITS + split) * 2 + 1) * REPEAT + r, tl.zeros([BLOCK_R], tl.float32), mask=live)


@triton.jit
def _combine(
    out, parts, sums, SPLITS: tl.constexpr, ROWS: tl.constexpr, VALUE: tl.constexpr, PDL: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one query head; those that saw nothing have a total of 0 and may hold anything."""
    row, s = tl.program_id(0), tl.arange(0, BLOCK_S)
    dv = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    part, r = row // ROWS, row % ROWS
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    at = (part * SPLITS + s).to(tl.int64)
    total = tl.load(sums + (at * 2 + 1) * ROWS + r, mask=s < SPLITS, other=0)
    best = tl.load(sums + at * 2 * ROWS + r, mask=total > 0, other=-1e30)
    share = tl.where(total > 0, tl.exp2(best - tl.max(best, 0)), 0)
    inside = (total > 0)[:, None] & (dv < VALUE)[None, :]
    value = tl.load(parts + (at * ROWS + r)[:, None] * VALUE + dv[None, :], mask=inside, other=0)
    whole = tl.sum(share * total, 0)
    merged = tl.sum(value * share[:, None], 0) / tl.where(whole > 0, whole, 1)
    tl.store(out + row.to(tl.int64) * VALUE + dv, merged.to(out.dtype.element_ty), mask=dv < VALUE)
