"""Dense attention of one token over the latents of MLA: a Triton kernel of `effpass::cached_attention`.

The values are the first V channels of the keys. The kernel is flash-decoding
(https://crfm.stanford.edu/2023/10/12/flashdecoding.html) with operands exchanged: slots are the rows of both matrix
products, and the query heads, which share one key, are the columns. Rows are therefore never padded, and a tile of
latents in shared memory serves both scores and weighted sums. From compute capability 9.0 on, full tiles are read by
the tensor memory accelerator, if sizes and strides permit.

`_latent` splits the slots of up to 32 query heads over several programs. Their partial results are many and are merged
by a second launch, `_combine`. Scores, statistics and partial sums are float32; weights are rounded to the dtype of the
keys, and the output to that of the query.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.chosen_attention import fits, is_latent
from effpass.lowering.kernels.launch import descriptor, launch_options, multiprocessors, overlaps
from effpass.lowering.kernels.running_softmax import scaled

__all__ = ["TILING", "Tiling", "cached_attention", "supported"]


class Tiling(NamedTuple):
    """Tile sizes and launch configuration.

    Attributes:
        block_n: slots per tile.
        num_warps: warps per program.
        num_stages: stages of the software pipeline, which buffer tiles.
        resident: programs per multiprocessor.
        has_descriptors: whether tiles are read by the tensor memory accelerator if possible.
    """

    block_n: int
    num_warps: int
    num_stages: int
    resident: int = 1
    has_descriptors: bool = True


TILING = Tiling(64, 4, 2)
_WIDE = Tiling(16, 4, 2, has_descriptors=False)  # for float32


def supported(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Return whether the kernel supports `query` [B, H, 1, K]: one token, and `values` is a view of `keys`."""
    return (
        query.shape[2] == 1
        and keys.shape[2] > 0
        and is_latent(keys, values)
        and fits(query, keys, values, keys.shape[1])
    )


def cached_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_positions: Tensor,
    query_positions: Tensor,
    filled: Tensor,
    scale: float,
    window: int,
    softcap: float,
    how: Tiling = TILING,
) -> Tensor:
    """Run `effpass::cached_attention` on tensors that are :func:`supported`, without a window.

    `how` applies to 16-bit dtypes only.
    """
    assert not window
    query = query if query.stride(-1) == 1 else query.contiguous()
    (batch, heads, _, key_size), (_, groups, slots, value_size) = query.shape, values.shape
    device, how = query.device, how if query.element_size() == 2 else _WIDE
    repeat = heads // groups
    rows = max(r for r in range(1, min(repeat, 32) + 1) if repeat % r == 0)
    parts_of, of_rows = repeat // rows, batch * (heads // rows)
    splits = _splits(of_rows, triton.cdiv(slots, how.block_n), how.resident * multiprocessors(device))
    out = query.new_empty((batch, 1, heads, value_size))
    parts = query.new_empty((of_rows, splits, rows, value_size), dtype=torch.float32)
    sums = query.new_empty((of_rows, splits, 2, rows), dtype=torch.float32)
    rest = max(16, triton.next_power_of_2(key_size - value_size))
    main = tail = None
    if how.has_descriptors and rest == key_size - value_size:
        main, tail = descriptor(keys, how.block_n, value_size), descriptor(keys, how.block_n, rest)
    _latent[(splits, of_rows)](
        query, keys, main, tail, key_positions, query_positions, filled, parts, sums, query.stride(0), query.stride(1),
        *keys.stride()[:3], key_positions.stride(0), query_positions.stride(0), slots, scale, softcap, GROUPS=groups,
        PARTS_OF=parts_of, REPEAT=rows, KEY=key_size, VALUE=value_size, SOFTCAP=softcap != 0,
        DESCRIBED=main is not None and tail is not None, SPLITS=splits, PDL=overlaps(device),
        BLOCK_R=max(16, triton.next_power_of_2(rows)), BLOCK_N=how.block_n, BLOCK_REST=rest,
        **launch_options(device, how.num_warps, how.num_stages),
    )  # fmt: skip
    width = min(max(16, 4096 // triton.next_power_of_2(splits)), value_size, 128)
    _combine[(batch * heads, triton.cdiv(value_size, width))](
        out, parts, sums, SPLITS=splits, ROWS=rows, VALUE=value_size, PDL=overlaps(device),
        BLOCK_S=triton.next_power_of_2(splits), BLOCK_V=width, **launch_options(device, 4),
    )  # fmt: skip
    return out


def _splits(of_rows: int, tiles: int, programs: int) -> int:
    """Return how many programs share the slots; a power of two if that leaves few multiprocessors idle."""
    splits = max(1, min(programs // of_rows, tiles))
    whole = 1 << splits.bit_length() - 1
    return whole if whole >= 0.95 * splits else splits


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _add_tile(
    k, k_rest, q, q_rest, visible, best, total, sum_v, scale, softcap, SOFTCAP: tl.constexpr
):  # fmt: skip
    """Highest score [R], sum of weights [R] and of weighted values [V, R], with one more tile of latents [N, V]."""
    score = tl.dot(k, q, input_precision="ieee")
    score = tl.dot(k_rest, q_rest, score, input_precision="ieee")
    score = scaled(score, scale, softcap, SOFTCAP)
    score = tl.where(visible[:, None], score, float("-inf"))
    higher = tl.maximum(best, tl.max(score, 0))
    weight = tl.exp2(score - higher[None, :])
    fade = tl.exp2(best - higher)
    total = total * fade + tl.sum(weight, 0)
    sum_v = tl.dot(tl.trans(k), weight.to(k.dtype), sum_v * fade[None, :], input_precision="ieee")
    return higher, total, sum_v


@triton.jit(do_not_specialize=["slots"])
def _latent(
    query, keys, main, tail, key_positions, query_positions, filled, parts, sums, query_b, query_h, keys_b, keys_h,
    keys_s, positions_b, query_positions_b, slots, scale, softcap, GROUPS: tl.constexpr, PARTS_OF: tl.constexpr,
    REPEAT: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, SOFTCAP: tl.constexpr, DESCRIBED: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    split, part = tl.program_id(0), tl.program_id(1)
    head = part // PARTS_OF
    b, group = (head // GROUPS).to(tl.int64), head % GROUPS
    r, c, d, span = tl.arange(0, BLOCK_R), tl.arange(0, VALUE), tl.arange(0, BLOCK_REST), tl.arange(0, BLOCK_N)
    live, of_rest = r < REPEAT, VALUE + d
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    heads_of = query + b * query_b + (part % (GROUPS * PARTS_OF) * REPEAT + r) * query_h
    q = tl.trans(tl.load(heads_of[:, None] + c[None, :], mask=live[:, None], other=0))
    q_rest = tl.load(heads_of[:, None] + of_rest[None, :], mask=live[:, None] & (of_rest < KEY)[None, :], other=0)
    q_rest = tl.trans(q_rest)
    end = tl.minimum(tl.load(filled), slots)
    now = tl.load(query_positions + b * query_positions_b)
    key_positions += b * positions_b
    first_row = ((b * keys_b + group * keys_h) // keys_s).to(tl.int32)
    keys += b * keys_b + group * keys_h
    share = tl.cdiv(tl.cdiv(end, SPLITS), BLOCK_N) * BLOCK_N
    begin = split * share
    stop = tl.minimum(begin + share, end)
    best = tl.full([BLOCK_R], -1e30, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    sum_v = tl.zeros([VALUE, BLOCK_R], tl.float32)
    masked = begin
    if DESCRIBED:
        # Full tiles only, because slots from `end` on are undefined.
        masked = begin + tl.maximum(stop - begin, 0) // BLOCK_N * BLOCK_N
        for first in range(begin, masked, BLOCK_N):
            k, k_rest = main.load([first_row + first, 0]), tail.load([first_row + first, VALUE])
            position = tl.load(key_positions + first + span)
            best, total, sum_v = _add_tile(
                k, k_rest, q, q_rest, (position >= 0) & (position <= now), best, total, sum_v, scale, softcap, SOFTCAP
            )  # fmt: skip
    for first in range(masked, stop, BLOCK_N):
        slot = first + span
        reach = slot < stop
        position = tl.load(key_positions + slot, mask=reach, other=-1)
        rows = keys + slot.to(tl.int64) * keys_s
        k = tl.load(rows[:, None] + c[None, :], mask=reach[:, None], other=0)
        k_rest = tl.load(rows[:, None] + of_rest[None, :], mask=reach[:, None] & (of_rest < KEY)[None, :], other=0)
        best, total, sum_v = _add_tile(
            k, k_rest, q, q_rest, (position >= 0) & (position <= now), best, total, sum_v, scale, softcap, SOFTCAP
        )  # fmt: skip
    at = (part * SPLITS + split).to(tl.int64)
    if begin < stop:
        tl.store(parts + (at * REPEAT + r)[None, :] * VALUE + c[:, None], sum_v, mask=live[None, :])
        tl.store(sums + at * 2 * REPEAT + r, best, mask=live)
    tl.store(sums + (at * 2 + 1) * REPEAT + r, total, mask=live)


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
