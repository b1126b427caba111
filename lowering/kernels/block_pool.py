"""Triton kernels of `effpass::page_write` and `effpass::fetch_blocks` (:mod:`effpass.lowering.ops.block_pool`).

    write    one program per sequence and KV head: stores a token on the host and, if its block has one, in the page
    plan     one program per sequence and KV head: finds wanted blocks without a page and the pages to evict for them
    copy     a few programs: copy these blocks from host memory over the bus into the pages
    arrive   one program: measures how long the main stream waits for the copies

`write` casts keys and values to the dtype of the pool; the other kernels do no floating-point arithmetic.

A program of `copy` has 32 KiB of loads in flight before it stores any of them. A bus with 50 GB/s and a latency of 3 us
holds 150 KiB, so that two dozen programs fill it and leave most of the device to computation that runs concurrently.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer

from effpass.lowering.kernels.largest import NEVER, choose
from effpass.lowering.kernels.launch import launch_options, overlaps

__all__ = ["arrive", "copy_blocks", "fetch_blocks", "page_write"]

_PROGRAMS = 24  # programs that copy
_CHUNK = 32768  # bytes in flight per program


def page_write(key: Tensor, value: Tensor, start: Tensor, host: Tensor, pages: Tensor, block_table: Tensor) -> None:
    """Run `effpass::page_write`; keys and values are copied if their last dimension is not contiguous."""
    (batch, groups, _, key_size), value_size = key.shape, value.shape[-1]
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    _write[(batch * groups,)](
        key, value, start, host, pages, block_table, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        host.shape[2], GROUPS=groups, KEY=key_size, VALUE=value_size, BLOCK=host.shape[3], PDL=overlaps(key.device),
        SIZE=max(16, triton.next_power_of_2(max(key_size, value_size))), **launch_options(key.device, 1),
    )  # fmt: skip


def fetch_blocks(
    chosen: Tensor, filled: Tensor, host: Tensor, pages: Tensor, block_table: Tensor, owner: Tensor, age: Tensor,
    clock: Tensor, moves: Tensor, moved: Tensor, counts: Tensor, entry: int,
) -> None:  # fmt: skip
    """Run `effpass::fetch_blocks` on the current stream: plan, then copy."""
    (batch, groups, blocks, block, _), entries, slots = host.shape, chosen.shape[2], owner.shape[2]
    widest = max(entries, slots)
    _plan[(batch * groups,)](
        chosen, filled, block_table, owner, age, clock, moves, moved, counts, blocks, ENTRIES=entries, ENTRY=entry,
        BLOCK=block, SLOTS=slots, PLACES=moves.shape[2], ALL=triton.next_power_of_2(max(16, entries)),
        OF_HEAD=triton.next_power_of_2(max(16, slots)), LISTED=triton.next_power_of_2(max(16, moves.shape[2])),
        **launch_options(host.device, 4 if widest <= 2048 else 8) | _no_overlap(host.device),
    )  # fmt: skip
    copy_blocks(host, pages, moves, moved)


def copy_blocks(host: Tensor, pages: Tensor, moves: Tensor, moved: Tensor) -> None:
    """Copy blocks from host memory into pages.

    Args:
        host: [B, G, N, block, W], read.
        pages: [B G C, block, W], written.
        moves: int32 [B, G, M, 2], block and page of each copy.
        moved: int32 [B, G], number of entries of `moves` in use.
    """
    batch, groups, blocks, block, width = host.shape
    heads, size, places = batch * groups, block * width, moves.shape[2]
    of_heads = min(heads, _PROGRAMS)
    _copy[(min(places, _PROGRAMS // of_heads), of_heads)](
        host, pages, moves, moved, heads, blocks, SIZE=size, PLACES=places,
        CHUNK=min(triton.next_power_of_2(size), _CHUNK // host.element_size()),
        **launch_options(host.device, 8) | _no_overlap(host.device),
    )  # fmt: skip


def arrive(times: Tensor, waits: bool) -> None:
    """Record that one of two streams has reached the point where they join.

    Args:
        times: int64 [3], written; see :func:`effpass.lowering.ops.block_pool.join`.
        waits: whether this is the stream that waits for the other one.
    """
    _arrive[(1,)](times, WAITS=waits, **launch_options(times.device, 1) | _no_overlap(times.device))


def _no_overlap(device: torch.device) -> dict[str, bool]:
    return {"launch_pdl": False} if overlaps(device) else {}


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["blocks"])
def _write(
    key, value, start, host, pages, block_table, key_b, key_h, value_b, value_h, blocks, GROUPS: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    head, d = tl.program_id(0), tl.arange(0, SIZE)
    b, group = (head // GROUPS).to(tl.int64), head % GROUPS
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.load(start)
    n, inside = slot // BLOCK, slot % BLOCK
    there = n < blocks
    page = tl.load(block_table + head * blocks + n, mask=there, other=-1)
    k = tl.load(key + b * key_b + group * key_h + d, mask=d < KEY, other=0).to(host.dtype.element_ty)
    v = tl.load(value + b * value_b + group * value_h + d, mask=d < VALUE, other=0).to(host.dtype.element_ty)
    far = host + ((head.to(tl.int64) * blocks + n) * BLOCK + inside) * (KEY + VALUE)
    near = pages + (page.to(tl.int64) * BLOCK + inside) * (KEY + VALUE)
    tl.store(near + d, k, mask=(d < KEY) & (page >= 0))
    tl.store(near + KEY + d, v, mask=(d < VALUE) & (page >= 0))
    tl.store(far + d, k, mask=(d < KEY) & there)
    tl.store(far + KEY + d, v, mask=(d < VALUE) & there)


@triton.jit(do_not_specialize=["blocks"])
def _plan(
    chosen, filled, block_table, owner, age, clock, moves, moved, counts, blocks, ENTRIES: tl.constexpr,
    ENTRY: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, PLACES: tl.constexpr, ALL: tl.constexpr,
    OF_HEAD: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    i, own, place = tl.arange(0, ALL), tl.arange(0, OF_HEAD), tl.arange(0, LISTED)
    end, now = tl.load(filled), tl.load(clock + head) + 1
    chosen += head * ENTRIES
    block_table += head * blocks
    owner += head * SLOTS
    age += head * SLOTS
    moves += head * PLACES * 2
    counts += head * 5
    first_page = head * SLOTS

    entry = tl.load(chosen + i, mask=i < ENTRIES, other=-1)
    before = tl.load(chosen + i - 1, mask=(i > 0) & (i < ENTRIES), other=-1)
    there = entry >= 0
    n = tl.where(there, entry * ENTRY // BLOCK, 0)
    is_new = there & ((before < 0) | (n != before * ENTRY // BLOCK))
    page = tl.load(block_table + n, mask=there, other=0)
    missing = there & (page < 0)
    tokens = tl.where(there, 1 if ENTRY == 1 else tl.minimum(end - n * BLOCK, BLOCK), 0)
    after = end // BLOCK
    of_after = tl.load(block_table + after, mask=after < blocks, other=first_page)
    asks = (of_after < 0).to(tl.int32)

    # Wanted pages get the age of this step and are not evicted; the other pages are evicted in the order of their age.
    tl.store(age + page - first_page, tl.zeros([ALL], tl.int32) + now, mask=is_new & (page >= 0))
    tl.store(age + of_after - first_page, now, mask=(after < blocks) & (of_after >= 0))
    tl.debug_barrier()
    of_page = tl.load(age + own, mask=own < SLOTS, other=2147483647, cache_modifier=".cg")
    copied = is_new & missing & (n != after)
    at = tl.cumsum(copied.to(tl.int32), 0) - 1
    copied = copied & (at < PLACES - 1)
    copies = tl.sum(copied.to(tl.int32), 0)
    goes, rank, count = choose(tl.where(of_page < now, -of_page, NEVER), copies + asks)
    old = tl.load(owner + own, mask=goes, other=-1)
    tl.store(block_table + old, tl.full([OF_HEAD], -1, tl.int32), mask=goes & (old >= 0))
    tl.store(moves + at * 2, n, mask=copied)
    tl.store(moves + copies * 2, after, mask=asks > 0)
    tl.store(moves + rank * 2 + 1, first_page + own, mask=goes)
    tl.debug_barrier()
    block = tl.load(moves + place * 2, mask=place < count, other=0, cache_modifier=".cg")
    to = tl.load(moves + place * 2 + 1, mask=place < count, other=0, cache_modifier=".cg")
    tl.store(block_table + block, to, mask=place < count)
    tl.store(owner + to - first_page, block, mask=place < count)
    tl.store(age + to - first_page, tl.zeros([LISTED], tl.int32) + now, mask=place < count)
    tl.store(moved + head, count)
    tl.store(clock + head, now)
    tl.store(counts, tl.load(counts) + tl.sum(is_new.to(tl.int32), 0))
    tl.store(counts + 1, tl.load(counts + 1) + tl.sum((is_new & missing).to(tl.int32), 0))
    tl.store(counts + 2, tl.load(counts + 2) + tl.sum(tokens, 0))
    tl.store(counts + 3, tl.load(counts + 3) + tl.sum(tl.where(missing, tokens, 0), 0))
    tl.store(counts + 4, tl.load(counts + 4) + count)


@triton.jit(do_not_specialize=["heads", "blocks"])
def _copy(
    host, pages, moves, moved, heads, blocks, SIZE: tl.constexpr, PLACES: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    share, c = tl.program_id(0), tl.arange(0, CHUNK)
    for head in range(tl.program_id(1), heads, tl.num_programs(1)):
        count = tl.load(moved + head)
        for i in range(share, count, tl.num_programs(0)):
            n = tl.load(moves + (head * PLACES + i) * 2)
            page = tl.load(moves + (head * PLACES + i) * 2 + 1)
            far = host + (head * blocks + n).to(tl.int64) * SIZE
            near = pages + page.to(tl.int64) * SIZE
            for first in tl.static_range(0, SIZE, CHUNK):
                tl.store(near + first + c, tl.load(far + first + c, mask=first + c < SIZE), mask=first + c < SIZE)


@triton.jit
def _arrive(times, WAITS: tl.constexpr):
    """times: how many of the two have arrived, when the one that waits did, and the sum of its waits."""
    now = globaltimer().to(tl.int64)
    if WAITS:
        tl.store(times + 1, now)
    if tl.atomic_add(times, 1, sem="acq_rel") == 1:
        tl.store(times, 0)
        if not WAITS:
            waited = now - tl.load(times + 1, cache_modifier=".cg")
            tl.store(times + 2, tl.load(times + 2) + waited)
