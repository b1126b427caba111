"""Triton kernels of `effpass::route_blocks`: mean keys, scores of blocks, and the best blocks of each token.

    s[t, n] = scale · mean_h(q[t, h]) · mean(k in block n)        over the visible blocks n

`_means` averages keys, with one program per block and KV head; `_score` computes s, with one program per tile of tokens
and KV head; `_select` chooses the blocks of one token and KV head. Means and scores are float32, and the product uses
TF32 unless q is float32. Scores are stored for some tokens at a time, so that memory does not grow with the square of
the number of tokens. The budget and the offsets of sequences are read on the device, and the host does not wait.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effpass.lowering.kernels.largest import FORCED, MOST, NEVER, choose, in_order
from effpass.lowering.kernels.launch import launch_options, overlaps
from effpass.lowering.ops.routed_blocks import Blocks, places

__all__ = ["route_blocks", "supported"]

_SCORES = 1 << 26  # scores stored at once: 256 MiB


def supported(q: Tensor, k: Tensor, sequences: int, block: int) -> bool:
    """Return whether the kernels support q [T, H, K] and k [T, G, K]: head sizes from 16 to 256, up to 16384 blocks."""
    blocks = q.shape[0] // block + sequences
    return (
        q.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and 16 <= q.shape[2] <= 256
        and blocks <= MOST
        and k.shape[1] * q.shape[0] * blocks < 1 << 40
    )


def route_blocks(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, budget: Tensor, block: int, max_budget: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Run `effpass::route_blocks` on tensors that are :func:`supported`."""
    (tokens, heads, size), groups = q.shape, k.shape[1]
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    _assert(cu_seqlens, budget, tokens, block, max_budget)
    blocks = Blocks.of(cu_seqlens, tokens, block)
    count, width = blocks.start.shape[0], places(tokens, cu_seqlens.shape[0] - 1, block, max_budget)
    block_k = max(16, triton.next_power_of_2(size))
    means = torch.empty((groups, count, size), dtype=torch.float32, device=q.device)
    _means[(count, groups)](
        k, blocks.start, blocks.stop, means, *k.stride()[:2], count, KEY=size, BLOCK_K=block_k, ROWS=min(block, 32),
        **_options(q.device, 4),
    )  # fmt: skip
    chosen = torch.empty((groups, tokens, width), dtype=torch.int32, device=q.device)
    kept = torch.empty((groups, tokens), dtype=torch.float32, device=q.device)
    at_once = min(tokens, max(64, _SCORES // (groups * count) // 64 * 64))
    scores = torch.empty((groups, at_once, count), dtype=torch.float32, device=q.device)
    everything = triton.next_power_of_2(max(16, count))
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    block_m, block_n = (64, 64) if block_k <= 128 else (32, 32)
    for first in range(0, tokens, at_once):
        rows = min(at_once, tokens - first)
        _score[(triton.cdiv(rows, block_m), groups)](
            q, means, blocks.first, blocks.own, scores, *q.stride()[:2], first, at_once, tokens, count,
            scale * groups / heads, REPEAT=heads // groups, KEY=size, PRECISION=precision, BLOCK_M=block_m,
            BLOCK_N=block_n, BLOCK_K=block_k, **_options(q.device, 4),
        )  # fmt: skip
        _select[(rows, groups)](
            scores, blocks.first, blocks.own, budget, chosen, kept, first, at_once, tokens, count, width, block,
            ALL=everything, PLACES=triton.next_power_of_2(width),
            **_options(q.device, max(1, min(8, everything // 512))),
        )  # fmt: skip
    return chosen, kept.mean()


def _assert(cu_seqlens: Tensor, budget: Tensor, tokens: int, block: int, max_budget: int | None) -> None:
    """Check offsets and budget by assertions on the device, without waiting for it."""
    if cu_seqlens.device.type == "meta":
        return
    rises = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (cu_seqlens.diff() >= 0).all()
    torch._assert_async(rises, "effpass::route_blocks: cu_seqlens does not rise from 0 to T")
    torch._assert_async(budget > block, "effpass::route_blocks: the budget is less than the two blocks always chosen")
    if max_budget is not None:
        torch._assert_async(budget <= max_budget, "effpass::route_blocks: the budget is above max_budget")


def _options(device: torch.device, num_warps: int) -> dict[str, object]:
    return launch_options(device, num_warps) | ({"launch_pdl": False} if overlaps(device) else {})


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["blocks"])
def _means(
    keys, starts, stops, means, keys_t, keys_h, blocks, KEY: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr
):
    n, group = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(starts + n), tl.load(stops + n)
    dk = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_K], tl.float32)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < stop)[:, None] & (dk < KEY)[None, :]
        at = keys + row.to(tl.int64)[:, None] * keys_t + group.to(tl.int64) * keys_h + dk[None, :]
        total += tl.sum(tl.load(at, mask=inside, other=0).to(tl.float32), 0)
    mean = total / tl.maximum(stop - start, 1)
    tl.store(means + (group.to(tl.int64) * blocks + n) * KEY + dk, mean, mask=dk < KEY)


@triton.jit(do_not_specialize=["first", "at_once", "tokens", "blocks"])
def _score(
    query, means, first_block, own_block, scores, query_t, query_h, first, at_once, tokens, blocks, factor,
    REPEAT: tl.constexpr, KEY: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of tokens and every block that one of them sees."""
    group = tl.program_id(1).to(tl.int64)
    row, dk, span = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    token = first + row
    live = (row < at_once) & (token < tokens)
    begin = tl.min(tl.load(first_block + token, mask=live, other=2147483647), 0)
    end = tl.max(tl.load(own_block + token, mask=live, other=-1), 0) + 1
    inside = live[:, None] & (dk < KEY)[None, :]
    at = query + token.to(tl.int64)[:, None] * query_t + group * REPEAT * query_h + dk[None, :]
    pooled = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for head in range(REPEAT):
        pooled += tl.load(at + head * query_h, mask=inside, other=0).to(tl.float32)
    pooled = pooled * factor
    means += group * blocks * KEY
    scores += (group * at_once + row.to(tl.int64)[:, None]) * blocks
    for n in range(begin, end, BLOCK_N):
        block = n + span
        kept = (block < end)[None, :] & (dk < KEY)[:, None]
        mean = tl.load(means + block.to(tl.int64)[None, :] * KEY + dk[:, None], mask=kept, other=0)
        found = tl.dot(pooled, mean, input_precision=PRECISION)
        tl.store(scores + block[None, :], found, mask=live[:, None] & (block < end)[None, :])


@triton.jit(do_not_specialize=["first", "at_once", "tokens", "blocks", "places"])
def _select(
    scores, first_block, own_block, budget, chosen, kept, first, at_once, tokens, blocks, places, block_size,
    ALL: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """One token's list."""
    row, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = first + row
    begin, own = tl.load(first_block + token), tl.load(own_block + token)
    allowed = tl.minimum((tl.load(budget).to(tl.int32) + block_size - 1) // block_size, places)
    n = tl.arange(0, ALL)
    seen = n <= own - begin
    score = tl.load(scores + (group * at_once + row) * blocks + begin + n, mask=seen, other=float("-inf"))
    key = tl.where(seen, tl.where((n == 0) | (n == own - begin), FORCED, in_order(score)), NEVER)
    is_chosen, rank, count = choose(key, allowed)
    out = chosen + (group * tokens + token) * places
    tl.store(out + rank, begin + n, mask=is_chosen)
    place = tl.arange(0, PLACES)
    tl.store(out + place, tl.full([PLACES], -1, tl.int32), mask=(place >= count) & (place < places))
    weight = tl.exp2((score - tl.max(score, 0)) * 1.4426950408889634)
    tl.store(kept + group * tokens + token, tl.sum(tl.where(is_chosen, weight, 0.0), 0) / tl.sum(weight, 0))
