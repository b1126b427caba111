"""Triton kernel of `effpass::tree_attention`: the nodes of a token tree attend to a long prefix and to their ancestors.

The equation is that of :mod:`effpass.lowering.ops.tree_attention`. As in
:mod:`effpass.lowering.kernels.decode_attention`, the slots of each KV head are cut into tiles, which several programs
process in turn with an online softmax; the last program to finish merges the partial results in their order. The rows
of a tile are the nodes times the query heads that share the KV head. If there are more rows than a tile holds, programs
for the same slots run next to each other, so that slots are read from memory once.

The tiles of the tree follow those of the prefix, and each tile of the tree lies in one word of the ancestor bits. If
blocks of the prefix were chosen, its tiles are parts of these blocks. Scores, statistics and partial sums are float32;
weights are rounded to the dtype of the values, and the output to that of the query.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.launch import counters, launch_options, multiprocessors, overlaps
from effpass.lowering.kernels.running_softmax import accumulate, scores, update

__all__ = ["supported", "tree_attention"]

_WORD = tl.constexpr(64)
_SHORT = 2048  # slots of a prefix up to which programs load ahead


def supported(query: Tensor, keys: Tensor, values: Tensor, block: int) -> bool:
    """Return whether the kernel supports `query` [B, H, T, K]: head sizes 16 to 256, one dtype, `block` % 64 == 0."""
    return (
        query.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and keys.dtype == values.dtype == query.dtype
        and 16 <= query.shape[-1] <= 256
        and 16 <= values.shape[-1] <= 256
        and keys.stride(-1) == values.stride(-1) == 1
        and query.numel() > 0
        and block % 64 == 0
    )


def tree_attention(
    query: Tensor, keys: Tensor, values: Tensor, key_positions: Tensor, query_positions: Tensor, lengths: Tensor,
    ancestors: Tensor, first: int, scale: float, window: int, softcap: float, chosen: Tensor | None, block: int,
) -> Tensor:  # fmt: skip
    """Run `effpass::tree_attention` on tensors that are :func:`supported`."""
    (batch, heads, tokens, key_size), (_, groups, slots, value_size) = query.shape, values.shape
    device, repeat = query.device, heads // groups
    query, key_positions, query_positions, ancestors = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (query, key_positions, query_positions, ancestors)
    )
    shape = tile_shape(tokens * repeat, key_size, value_size, query.element_size(), first, in_blocks=chosen is not None)
    options = launch_options(device, shape.pop("num_warps"))
    nodes = min(64 * ancestors.shape[2], slots - first)
    row_tiles = triton.cdiv(tokens * repeat, shape["BLOCK_R"])
    chosen = None if chosen is None else chosen.contiguous()
    most = 0 if chosen is None else chosen.shape[2]
    slots_read = first if chosen is None else min(first, most * block)
    tiles = triton.cdiv(slots_read, shape["BLOCK_N"]) + triton.cdiv(nodes, shape["BLOCK_T"])
    programs = row_tiles * batch * groups
    splits = max(1, min(2 * multiprocessors(device) // programs, triton.cdiv(tiles, shape["LEAST"])))
    out = query.new_empty((batch, tokens, heads, value_size))
    parts = sums = done = None
    if splits > 1:
        parts = query.new_empty((programs, splits, shape["BLOCK_R"], value_size), dtype=torch.float32)
        sums = query.new_empty((programs, splits, 2, shape["BLOCK_R"]), dtype=torch.float32)
        done = counters(device, programs)
    _attend[(row_tiles, splits, batch * groups)](
        query, keys, values, key_positions, query_positions, lengths, ancestors, chosen, out, parts, sums, done,
        *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3], key_positions.stride(0),
        query_positions.stride(0), *ancestors.stride()[:2], tokens, first, nodes, scale, softcap, window, GROUPS=groups,
        REPEAT=repeat, KEY=key_size, VALUE=value_size, SPLITS=splits, SOFTCAP=softcap != 0,
        WINDOW=window != 0, MOST=most, LISTED=triton.next_power_of_2(max(most, 1)), BLOCK=block, PDL=overlaps(device),
        **shape, **options,
    )  # fmt: skip
    return out


def tile_shape(
    rows: int, key_size: int, value_size: int, element_size: int, slots: int, in_blocks: bool
) -> dict[str, int | bool]:
    """Return the tile sizes, and the minimum number of tiles per program; with fewer, merging costs more than it gains.

    If the prefix has at most :data:`_SHORT` slots and is not `in_blocks`, programs load ahead into registers, the first
    tile before they wait; few rows are then cut into tiles of 16, so that little is left to do afterwards. A longer
    prefix is read through shared memory, in larger tiles of rows, so that slots are not read too often. The slots of a
    tile of the tree divide 64, the bits of a word, and so do those of a prefix in blocks.
    """
    block_k, block_v = (max(16, triton.next_power_of_2(size)) for size in (key_size, value_size))
    widest = max(block_k, block_v) * element_size
    block_t = 64 if widest <= 256 else 32
    shape = {"BLOCK_T": block_t, "BLOCK_K": block_k, "BLOCK_V": block_v}
    if slots > _SHORT or in_blocks:
        block_r = 16 if rows <= 16 else 32 if rows <= 32 or widest > 512 else 64
        return {**shape, "BLOCK_R": block_r, "BLOCK_N": block_t, "LEAST": 4, "AHEAD": False, "num_warps": 4}
    block_r = 16 if rows <= (96 if widest <= 128 else 32) else 64 if widest <= 256 else 32
    block_n = 128 if widest <= 128 and block_r == 16 else block_t
    least = max(1, (128 if block_r == 16 else 256) // block_n)
    num_warps = 4 if widest <= 128 else 8
    return {**shape, "BLOCK_R": block_r, "BLOCK_N": block_n, "LEAST": least, "AHEAD": True, "num_warps": num_warps}


@triton.jit(do_not_specialize=["tokens", "first", "nodes", "window"])
def _attend(
    query, keys, values, key_positions, query_positions, lengths, ancestors, chosen, out, parts, sums, done, query_b,
    query_h, query_t, keys_b, keys_h, keys_s, values_b, values_h, values_s, key_positions_b, query_positions_b,
    ancestors_b, ancestors_t, tokens, first, nodes, scale, softcap, window, GROUPS: tl.constexpr, REPEAT: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, MOST: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    row_tile, split, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, group = (head // GROUPS).to(tl.int64), head % GROUPS
    dk = tl.arange(0, BLOCK_K)
    row = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    token, live = row // REPEAT, row < tokens * REPEAT
    keys += b * keys_b + group * keys_h
    values += b * values_b + group * values_h
    key_positions += b * key_positions_b
    of_rows = b * query_b + token.to(tl.int64) * query_t + (group * REPEAT + row % REPEAT) * query_h
    if PDL and not AHEAD:
        gdc_wait()
        gdc_launch_dependents()
    of_queries = tl.load(query_positions + b * query_positions_b + token, mask=live, other=-1)
    earliest = tl.min(tl.where(of_queries >= 0, of_queries, 2147483647), 0) - window
    # Programs whose rows are all padding read nothing.
    there = tl.max(of_queries, 0) >= 0
    end = tl.where(there, tl.minimum(tl.load(lengths + b), first), 0)
    tiles = tl.cdiv(end, BLOCK_N)
    if MOST > 0:
        chosen += head * MOST
        listed = tl.arange(0, LISTED)
        known = tl.load(chosen + listed, mask=listed < MOST, other=-1)
        tiles = tl.where(there, tl.sum((known >= 0).to(tl.int32), 0) * (BLOCK // BLOCK_N), 0)
    all_tiles = tiles + tl.where(there, tl.cdiv(nodes, BLOCK_T), 0)
    active = tl.maximum(tl.minimum(tl.cdiv(all_tiles, LEAST), SPLITS), 1)
    if split < active:
        best = tl.full([BLOCK_R], -1e30, tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        sum_v = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
        # Tiles continue to be taken in turn across the end of the prefix.
        begin = split + tl.cdiv(tl.maximum(tiles - split, 0), active) * active
        of_words = ancestors + b * ancestors_b + token.to(tl.int64) * ancestors_t
        if AHEAD:
            slot, of_keys, seen = _tile(
                split, tiles, end, key_positions, chosen, earliest, BLOCK_N, BLOCK, MOST, WINDOW
            )  # fmt: skip
            k, v = _slots(keys, values, slot, seen, keys_s, values_s, KEY, VALUE, BLOCK_K, BLOCK_V)
            if PDL:
                gdc_wait()
                gdc_launch_dependents()
            q = tl.load(query + of_rows[:, None] + dk[None, :], mask=live[:, None] & (dk < KEY)[None, :], other=0)
            place, reach, of_nodes, words = _nodes(begin - tiles, nodes, first, key_positions, of_words, live, BLOCK_T)
            node_k, node_v = _slots(keys, values, place, reach, keys_s, values_s, KEY, VALUE, BLOCK_K, BLOCK_V)
            for tile in range(split, tiles, active):
                # Load the next tile while this one is processed.
                slot, of_next, seen = _tile(
                    tile + active, tiles, end, key_positions, chosen, earliest, BLOCK_N, BLOCK, MOST, WINDOW
                )  # fmt: skip
                next_k, next_v = _slots(keys, values, slot, seen, keys_s, values_s, KEY, VALUE, BLOCK_K, BLOCK_V)
                best, total, sum_v = update(
                    q, tl.trans(k), v, of_keys, of_queries, best, total, sum_v, scale, softcap, window, True, SOFTCAP,
                    WINDOW,
                )  # fmt: skip
                k, v, of_keys = next_k, next_v, of_next
        else:
            q = tl.load(query + of_rows[:, None] + dk[None, :], mask=live[:, None] & (dk < KEY)[None, :], other=0)
            for tile in tl.range(split, tiles, active, num_stages=2):
                slot, of_keys, seen = _tile(
                    tile, tiles, end, key_positions, chosen, earliest, BLOCK_N, BLOCK, MOST, WINDOW
                )  # fmt: skip
                k, v = _slots(keys, values, slot, seen, keys_s, values_s, KEY, VALUE, BLOCK_K, BLOCK_V)
                best, total, sum_v = update(
                    q, tl.trans(k), v, of_keys, of_queries, best, total, sum_v, scale, softcap, window, True, SOFTCAP,
                    WINDOW,
                )  # fmt: skip
        for tile in range(begin, all_tiles, active):
            if not AHEAD:
                place, reach, of_nodes, words = _nodes(
                    tile - tiles, nodes, first, key_positions, of_words, live, BLOCK_T
                )  # fmt: skip
                node_k, node_v = _slots(keys, values, place, reach, keys_s, values_s, KEY, VALUE, BLOCK_K, BLOCK_V)
            bits = ((tile - tiles) * BLOCK_T + tl.arange(0, BLOCK_T)) % _WORD
            visible = ((words[:, None] >> bits.to(tl.int64)[None, :]) & 1) == 1
            visible = visible & (of_nodes >= 0)[None, :] & (of_nodes[None, :] <= of_queries[:, None])
            if WINDOW:
                visible = visible & (of_queries[:, None] - of_nodes[None, :] < window)
            score = tl.where(visible, scores(q, tl.trans(node_k), scale, softcap, SOFTCAP), float("-inf"))
            best, total, sum_v = accumulate(score, node_v, best, total, sum_v)
            if AHEAD:
                place, reach, of_nodes, words = _nodes(
                    tile + active - tiles, nodes, first, key_positions, of_words, live, BLOCK_T
                )  # fmt: skip
                node_k, node_v = _slots(keys, values, place, reach, keys_s, values_s, KEY, VALUE, BLOCK_K, BLOCK_V)
        out += (b * tokens * GROUPS + group) * REPEAT * VALUE  # the output of node 0
        places = (token * (GROUPS * REPEAT) + row % REPEAT) * VALUE
        if SPLITS > 1:
            if active > 1:
                _merge(
                    out, places, live, sum_v, total, best, parts, sums, done, head * tl.num_programs(0) + row_tile,
                    split, active, VALUE, SPLITS, BLOCK_R, BLOCK_V,
                )  # fmt: skip
            else:
                _store(out, places, live, sum_v, total, VALUE, BLOCK_V)
        else:
            _store(out, places, live, sum_v, total, VALUE, BLOCK_V)


@triton.jit
def _tile(
    tile, tiles, end, key_positions, chosen, earliest, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Slots of a tile of the prefix, their positions, and whether to read them; tiles past the last one have none."""
    span = tl.arange(0, BLOCK_N)
    if MOST > 0:
        parts: tl.constexpr = BLOCK // BLOCK_N
        block = tl.load(chosen + tile // parts, mask=tile < tiles, other=0)
        slot = block * BLOCK + tile % parts * BLOCK_N + span
    else:
        slot = tile * BLOCK_N + span
    reach = (slot < end) & (tile < tiles)
    of_keys = tl.load(key_positions + slot, mask=reach, other=-1)
    if WINDOW:
        reach = reach & (of_keys > earliest)
    return slot.to(tl.int64), of_keys, reach


@triton.jit
def _slots(
    keys, values, place, there, keys_s, values_s, KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Keys [N, K] and values [N, V] of slots."""
    dk, dv = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    return (
        tl.load(keys + place[:, None] * keys_s + dk[None, :], mask=there[:, None] & (dk < KEY)[None, :], other=0),
        tl.load(values + place[:, None] * values_s + dv[None, :], mask=there[:, None] & (dv < VALUE)[None, :], other=0),
    )


@triton.jit
def _nodes(tile, nodes, first, key_positions, of_words, live, BLOCK_T: tl.constexpr):
    """Slots of a tile of the tree, whether there are any, their positions, and the word of ancestors of each row."""
    node = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    reach = node < nodes
    place = (first + node).to(tl.int64)
    words = tl.load(of_words + tile * BLOCK_T // _WORD, mask=live & (tile * BLOCK_T < nodes), other=0)
    return place, reach, tl.load(key_positions + place, mask=reach, other=-1), words


@triton.jit
def _store(out, places, live, sum_v, total, VALUE: tl.constexpr, BLOCK_V: tl.constexpr):
    """A row that saw no slot has a total of 0 and gives 0."""
    dv = tl.arange(0, BLOCK_V)
    value = sum_v / tl.where(total > 0, total, 1)[:, None]
    inside = live[:, None] & (dv < VALUE)[None, :]
    tl.store(out + places[:, None] + dv[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _merge(
    out, places, live, sum_v, total, best, parts, sums, done, program, split, active, VALUE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Leave this program's softmax for the last one of its rows, which merges all and stores."""
    dv, row = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_R)
    of_part = row[:, None] * VALUE + dv[None, :]
    inside = (dv < VALUE)[None, :]
    parts += program.to(tl.int64) * SPLITS * BLOCK_R * VALUE
    sums += program * SPLITS * 2 * BLOCK_R
    tl.store(parts + split * BLOCK_R * VALUE + of_part, sum_v, mask=inside)
    tl.store(sums + split * 2 * BLOCK_R + row, best)
    tl.store(sums + (split * 2 + 1) * BLOCK_R + row, total)
    tl.debug_barrier()  # the counter must be incremented after the stores of all threads
    if tl.atomic_add(done + program, 1, sem="acq_rel") == active - 1:
        tl.store(done + program, 0)
        highest = tl.full([BLOCK_R], -1e30, tl.float32)
        for other in range(active):
            highest = tl.maximum(highest, tl.load(sums + other * 2 * BLOCK_R + row, cache_modifier=".cg"))
        whole = tl.zeros([BLOCK_R], tl.float32)
        merged = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
        for other in range(active):
            share = tl.exp2(tl.load(sums + other * 2 * BLOCK_R + row, cache_modifier=".cg") - highest)
            whole += share * tl.load(sums + (other * 2 + 1) * BLOCK_R + row, cache_modifier=".cg")
            part = tl.load(parts + other * BLOCK_R * VALUE + of_part, mask=inside, other=0, cache_modifier=".cg")
            merged += share[:, None] * part
        _store(out, places, live, merged, whole, VALUE, BLOCK_V)
