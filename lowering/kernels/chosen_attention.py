"""Attention of one token over chosen slots of a cache: the last kernel launch of `effpass::two_level_attention`.

    out = Σ_{s in S} softmax_s(c(scale · q · k_s)) v_s      over the set S of chosen slots

Several programs share each KV head. Every one of them determines S, writes its share of the list in ascending order and
attends to that share with an online softmax; the last one to finish merges the partial results. Over latents (MLA), one
key serves many query heads, and the partial results are as large as the keys that a program reads; there the query
heads are distributed over programs too. Scores, statistics and partial sums are float32; weights are rounded to the
dtype of the values, and the output to that of the query.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.decode_attention import _merge, _store
from effpass.lowering.kernels.key_index import strides
from effpass.lowering.kernels.largest import FORCED, NEVER, cut, in_order, ranks, write_share
from effpass.lowering.kernels.launch import counters, launch_options, multiprocessors, overlaps
from effpass.lowering.kernels.running_softmax import accumulate, scaled

__all__ = [
    "BLOCKS",
    "LISTED",
    "TILING",
    "TOKENS",
    "Programs",
    "Tiling",
    "attend_chosen",
    "beside",
    "block_keys",
    "fits",
    "forced_blocks",
    "grid_of",
    "is_latent",
    "unit_of",
]

# What a program chooses among: all blocks, the tokens of chosen blocks, or a list of tokens.
BLOCKS, TOKENS, LISTED = (tl.constexpr(i) for i in range(3))

_REGISTERS = 65536  # per multiprocessor


class Programs(NamedTuple):
    """Occupancy of a multiprocessor by the programs of a launch.

    Attributes:
        together: programs per multiprocessor if there are enough heads.
        num_warps: warps of a program that shares its multiprocessor.
        alone: warps of a program that has a multiprocessor to itself.
    """

    together: int
    num_warps: int
    alone: int

    def warps(self, programs: int) -> int:
        return self.num_warps if programs > 1 else self.alone


class Tiling(NamedTuple):
    """Tile sizes and occupancy of the three launches of a step.

    Attributes:
        scored: bytes of block statistics that a program reads at once.
        scoring: warps per multiprocessor that score blocks.
        choose: occupancy of the launch that chooses blocks.
        attend: occupancy of the launch that chooses tokens and attends.
        whole: maximum bytes of keys and values that a program reads as a single tile if they are its whole share.
        tile: bytes of keys and values per tile otherwise.
    """

    scored: int = 16 << 10
    scoring: int = 32
    choose: Programs = Programs(2, 16, 16)
    attend: Programs = Programs(1, 8, 8)
    whole: int = 64 << 10
    tile: int = 40 << 10


TILING = Tiling()


def beside(programs: int, device: torch.device, num_warps: int, num_stages: int = 1) -> dict[str, Any]:
    """Return launch options that limit the registers per thread so that `programs` fit on a multiprocessor."""
    options = launch_options(device, num_warps, num_stages)
    if options and programs > 1:
        options["maxnreg"] = _REGISTERS // (32 * num_warps * programs) // 8 * 8
    return options


def grid_of(count: int) -> tuple[int, int]:
    """Return rows and columns, powers of two, of a tile for `count` candidates; each row lies in one warp."""
    whole = triton.next_power_of_2(max(count, 16))
    columns = min(64, whole)
    return whole // columns, columns


def unit_of(blocks: int) -> int:
    """Return the unit in which kernels receive the number of blocks; 4 tells them that four can be loaded at once."""
    return 4 if blocks % 4 == 0 else 1


def is_latent(keys: Tensor, values: Tensor) -> bool:
    """Return whether `values` is a view of the first channels of `keys`, as in MLA, of a supported size."""
    return (
        values.data_ptr() == keys.data_ptr()
        and values.stride() == keys.stride()
        and values.shape[-1] < keys.shape[-1]
        and triton.next_power_of_2(values.shape[-1]) == values.shape[-1] >= 16
    )


def fits(query: Tensor, keys: Tensor, values: Tensor, groups: int) -> bool:
    """Return whether the kernel supports `query` [B, H, 1, K].

    All tensors must have one dtype. Head sizes are from 16 to 256, with up to 32 query heads per KV head; latents may
    have up to 512 + 128 channels.
    """
    (_, heads, _, key_size), value_size = query.shape, values.shape[-1]
    is_small = key_size <= 256 and value_size <= 256 and heads // groups <= 32
    return (
        query.numel() > 0
        and query.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and keys.dtype == values.dtype == query.dtype
        and keys.stride(-1) == values.stride(-1) == 1
        and key_size >= 16
        and value_size >= 16
        and (is_small or (is_latent(keys, values) and value_size <= 512 and key_size - value_size <= 128))
    )


def attend_chosen(
    query: Tensor, keys: Tensor, values: Tensor, block_table: Tensor | None, host: Tensor | None,
    key_positions: Tensor, query_positions: Tensor, filled: Tensor, chosen_blocks: Tensor, chosen_tokens: Tensor,
    of_scores: Tensor | None, places: Tensor | None, seen: Tensor, scores: Tensor, scale: float, softcap: float,
    block: int, sink: int, recent: int, is_pipelined: bool,
    kind: tl.constexpr, candidates: int, limit: int, how: Tiling,
) -> Tensor:  # fmt: skip
    """Choose slots and attend to them. Arguments not listed are those of `effpass::two_level_attention`.

    Args:
        query: [B, H, 1, K] with the last dimension contiguous.
        of_scores: float32 [B G, candidates], scores of tokens; None if `kind` is BLOCKS.
        places: int32 [B G, candidates], slots of these tokens if `kind` is LISTED; otherwise None.
        seen: int32 [B, G, N], read if `kind` is BLOCKS.
        scores: float32 [B, G, 2, N], scores of blocks, read if `kind` is BLOCKS.
        kind: BLOCKS, TOKENS or LISTED.
        candidates: number of blocks or tokens to choose among.
        limit: maximum number of blocks or tokens to choose, the size of `chosen_blocks` or `chosen_tokens`.
        how: tile sizes and occupancy.

    Returns:
        [B, 1, H, V].
    """
    (batch, heads, _, key_size), value_size = query.shape, values.shape[-1]
    groups = keys.shape[1] if block_table is None else block_table.shape[1]
    device, slots = query.device, key_positions.shape[1]
    blocks = triton.cdiv(slots, block)
    latent, unit = is_latent(keys, values), block if kind is BLOCKS else 1
    row_bytes = (key_size if latent else key_size + value_size) * query.element_size()
    all_rows, columns = grid_of(candidates)
    if kind is TOKENS:  # each row holds the tokens of one block
        all_rows, columns = triton.next_power_of_2(chosen_blocks.shape[2]), block
    rows, splits, programs = shares(
        heads // groups, limit * unit, row_bytes, value_size, batch * groups, multiprocessors(device),
        1 if row_bytes > 512 or all_rows * columns > 8192 else how.attend.together,
    )  # fmt: skip
    parts_of, of_rows = heads // groups // rows, batch * (heads // rows)
    out = query.new_empty((batch, 1, heads, value_size))
    block_r = max(16, triton.next_power_of_2(rows))
    live, block_v = triton.next_power_of_2(rows), max(16, triton.next_power_of_2(value_size))
    parts = sums = done = None
    if splits > 1:
        parts = query.new_empty((of_rows, splits, rows, value_size), dtype=torch.float32)
        sums = query.new_empty((of_rows, splits, 2, rows), dtype=torch.float32)
        done = counters(device, of_rows)
    at, of_values = strides(keys, block_table), strides(values, block_table)
    share = triton.cdiv(limit, splits)
    is_whole = programs == 1 and row_bytes <= 1024 and share * unit * row_bytes <= how.whole
    block_n = min(max(16, 1 << (how.tile // row_bytes).bit_length() - 1), 64)
    if is_whole:
        block_n = max(16, triton.next_power_of_2(share * unit))
    _attend[(splits, of_rows)](
        query, keys, values, block_table, key_positions, query_positions, filled, chosen_blocks, chosen_tokens,
        of_scores, places, seen, scores, out, parts, sums, done, query.stride(0), query.stride(1), *at, *of_values,
        key_positions.stride(0), query_positions.stride(0), slots, blocks // unit_of(blocks), scale, softcap, host,
        GROUPS=groups, PARTS_OF=parts_of, REPEAT=rows, KEY=value_size if latent else key_size,
        HOST=0 if host is None else host.shape[-1], REST=key_size - value_size if latent else 0, VALUE=value_size,
        LATENT=latent, KIND=kind.value, CANDIDATES=0 if kind is BLOCKS else candidates, LIMIT=limit, BLOCK=block,
        SINK=sink, RECENT=recent, PIPELINED=is_pipelined, UNIT=unit_of(blocks), SOFTCAP=softcap != 0, SPLITS=splits,
        PDL=overlaps(device), ROWS=all_rows, COLUMNS=columns, SHARE=triton.next_power_of_2(share), BLOCK_R=block_r,
        LIVE=live, BLOCK_N=block_n, BLOCK_K=block_v if latent else max(16, triton.next_power_of_2(key_size)),
        BLOCK_REST=max(16, triton.next_power_of_2(key_size - value_size)) if latent else 16, BLOCK_V=block_v,
        BLOCK_S=max(1, min(32, 8192 // (live * block_v))),
        # Loads depend on each other (slots, then their pages, then keys): 7 stages keep two or three tiles in flight.
        **beside(programs, device, how.attend.warps(programs), 1 if is_whole else 7),
    )  # fmt: skip
    return out


@functools.cache
def shares(
    repeat: int, reads: int, row_bytes: int, value_size: int, heads: int, processors: int, resident: int
) -> tuple[int, int, int]:
    """Choose how the work on one KV head is distributed, by the bytes that the slowest program reads.

    A program reads `reads / splits` keys with their values, and the last one also `splits` partial results in float32.
    The sum is minimized, with all programs on the device at once if possible. If there are many heads, `resident`
    programs share a multiprocessor, which then loads for one of them while it computes for another.

    Args:
        repeat: query heads per KV head.
        reads: number of keys chosen per KV head.
        row_bytes: bytes of a key and its value.
        value_size: size V of a value.
        heads: KV heads of all sequences.
        processors: number of multiprocessors.
        resident: programs per multiprocessor if there are many heads.

    Returns:
        Query heads per program, programs that share the keys of a KV head, and programs per multiprocessor.
    """
    most = 32 if value_size > 256 else 64
    best: tuple[float, int, int, int] | None = None
    for rows in (r for r in range(1, repeat + 1) if repeat % r == 0 and r <= most):
        programs = heads * (repeat // rows)
        together = resident if 4 * programs > processors else 1
        at_once = processors * together
        room = max(1, at_once // programs)
        for splits in sorted({1 << i for i in range(10) if 1 << i <= room} | {room}):
            splits = min(splits, triton.cdiv(reads, 64))
            waves = triton.cdiv(programs * splits, at_once)
            merged = 0 if splits == 1 else splits * rows * value_size * 4
            again = programs * reads * row_bytes / processors * 0.25  # reads by all programs together, out of a cache
            cost = max(waves * reads * row_bytes / splits, again) + merged
            if best is None or cost < best[0]:
                best = (cost, rows, splits, together)
    assert best is not None
    return best[1:]


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def forced_blocks(n, end, head, seen, blocks, BLOCK: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr):
    """Whether blocks `n` [R, C] before the last have tokens, and whether they are chosen without a score.

    `seen` of the last block is being written by this step; of the others it may be read before that has ended.
    """
    last = (end - 1) // BLOCK
    there = tl.load(seen + head * blocks + n, mask=(n < last) & (n < blocks), other=0) > 0
    forced = n > last - RECENT
    if SINK > 0:
        forced = forced | (ranks(there) < SINK)
    return there, forced


@triton.jit
def block_keys(n, there, forced, end, head, seen, scores, blocks, BLOCK: tl.constexpr, PIPELINED: tl.constexpr):
    """What blocks `n` are chosen by, int32 [R, C], from :func:`forced_blocks`."""
    last = (end - 1) // BLOCK
    newest = tl.load(seen + head * blocks + last, mask=(last >= 0) & (last < blocks), other=0)
    which = end % 2
    if PIPELINED:
        which = 1 - which
    score = tl.load(
        scores + (head * 2 + which) * blocks + n, mask=(n <= last) & (n < blocks), other=float("-inf")
    )  # fmt: skip
    key = tl.where(score > float("-inf"), tl.minimum(in_order(score), FORCED - 1), NEVER)
    there = there | ((n == last) & (newest > 0))
    return tl.where(there, tl.where(forced, FORCED, key), NEVER)


@triton.jit(do_not_specialize=["slots", "blocks"])
def _attend(
    query, keys, values, block_table, key_positions, query_positions, filled, chosen_blocks, chosen_tokens, of_scores,
    places, seen, scores, out, parts, sums, done, query_b, query_h, keys_b, keys_h, keys_s, values_b, values_h,
    values_s, positions_b, query_positions_b, slots, blocks, scale, softcap, host, GROUPS: tl.constexpr,
    PARTS_OF: tl.constexpr, REPEAT: tl.constexpr, KEY: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr,
    HOST: tl.constexpr, LATENT: tl.constexpr, KIND: tl.constexpr, CANDIDATES: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, PIPELINED: tl.constexpr, UNIT: tl.constexpr,
    SOFTCAP: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SHARE: tl.constexpr, BLOCK_R: tl.constexpr, LIVE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    split, part = tl.program_id(0), tl.program_id(1)
    blocks *= UNIT
    head = part // PARTS_OF  # index of the KV head among those of all sequences
    b, group = (head // GROUPS).to(tl.int64), head % GROUPS
    r, dk, dv, span = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    live = r < REPEAT
    of_heads = query + b * query_b + (part % (GROUPS * PARTS_OF) * REPEAT + r) * query_h
    q = tl.load(of_heads[:, None] + dk[None, :], mask=live[:, None] & (dk < KEY)[None, :], other=0)
    if REST > 0:
        dr = tl.arange(0, BLOCK_REST)
        q_rest = tl.load(of_heads[:, None] + (KEY + dr)[None, :], mask=live[:, None] & (dr < REST)[None, :], other=0)
    end = tl.minimum(tl.load(filled), slots)
    now = tl.load(query_positions + b * query_positions_b)
    key_positions += b * positions_b
    row = tl.arange(0, ROWS)
    place = row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if KIND == BLOCKS:
        there, forced = forced_blocks(place, end, head, seen, blocks, BLOCK, SINK, RECENT)
    if PDL:  # preceding launches have waited for the query, so it could be read above
        gdc_wait()
        gdc_launch_dependents()

    # Choose, and write this program's share of the list, entries `begin` to `stop`.
    if KIND == BLOCKS:
        key = block_keys(place, there, forced, end, head, seen, scores, blocks, BLOCK, PIPELINED)
        chosen_list = chosen_blocks + head * LIMIT
        written = place
    else:
        of_scores += head.to(tl.int64) * CANDIDATES
        graded = tl.load(of_scores + place, mask=place < CANDIDATES, other=float("-inf"))
        key = tl.where(graded > float("-inf"), in_order(graded), NEVER)
        chosen_list = chosen_tokens + head * LIMIT
        if KIND == TOKENS:
            kept: tl.constexpr = CANDIDATES // BLOCK
            number = tl.load(chosen_blocks + head * kept + row, mask=row < kept, other=0)
            written = number[:, None] * BLOCK + tl.arange(0, COLUMNS)[None, :]
        else:
            written = tl.load(places + head.to(tl.int64) * CANDIDATES + place, mask=place < CANDIDATES, other=0)
    chosen, count = cut(key, place, LIMIT, ROWS * COLUMNS)
    per: tl.constexpr = (LIMIT + SPLITS - 1) // SPLITS
    active = tl.maximum(tl.cdiv(count, per), 1)
    begin = split * per
    stop = tl.minimum(begin + per, LIMIT)
    write_share(chosen_list, chosen, written, begin, stop, count, SHARE)
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
            if KIND == BLOCKS:
                slot = tl.load(chosen_list + i // BLOCK, mask=reach, other=0, cache_modifier=".cg") * BLOCK + i % BLOCK
                reach = reach & (slot < end)
                position = tl.load(key_positions + slot, mask=reach, other=-1)
                visible = (position >= 0) & (position <= now)
            else:
                slot = tl.load(chosen_list + i, mask=reach, other=0, cache_modifier=".cg")
                visible = reach
            if block_table is None:
                of_k, of_v = keys + slot.to(tl.int64) * keys_s, values + slot.to(tl.int64) * values_s
            else:
                page = tl.load(block_table + head * blocks + slot // BLOCK, mask=reach, other=0).to(tl.int64)
                of_k = keys + (page * keys_b + slot % BLOCK * keys_s)
                of_v = values + (page * values_b + slot % BLOCK * values_s)
                if host is not None:  # blocks without a page are read over the bus
                    far = host + (head.to(tl.int64) * blocks * BLOCK + slot) * HOST
                    of_k = tl.where(page >= 0, of_k, far)
                    of_v = tl.where(page >= 0, of_v, far if LATENT else far + KEY)
            k = tl.load(of_k[:, None] + dk[None, :], mask=reach[:, None] & (dk < KEY)[None, :], other=0)
            if LATENT:
                v = k
            else:
                v = tl.load(of_v[:, None] + dv[None, :], mask=reach[:, None] & (dv < VALUE)[None, :], other=0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
            if REST > 0:
                of_rest = of_k[:, None] + (KEY + dr)[None, :]
                k_rest = tl.load(of_rest, mask=reach[:, None] & (dr < REST)[None, :], other=0)
                score = tl.dot(q_rest, tl.trans(k_rest), score, input_precision="ieee")
            score = scaled(score, scale, softcap, SOFTCAP)
            score = tl.where(visible[None, :], score, float("-inf"))
            best, total, sum_v = accumulate(score, v, best, total, sum_v)
        heads: tl.constexpr = GROUPS * PARTS_OF * REPEAT
        of_part = part % (GROUPS * PARTS_OF)
        if SPLITS == 1:
            _store(out, sum_v, total, b, of_part, r, live, 1, dv, heads, REPEAT, VALUE)
        else:
            if active == 1:
                _store(out, sum_v, total, b, of_part, r, live, 1, dv, heads, REPEAT, VALUE)
            else:
                _merge(
                    out, sum_v, total, best, parts, sums, done, split, part, active, b, of_part, r, live, 1, dv, heads,
                    REPEAT, VALUE, SPLITS, LIVE, BLOCK_V, BLOCK_S,
                )  # fmt: skip
