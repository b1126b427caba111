"""Triton kernels of `effpass::received_attention`: column sums of an attention matrix that is never stored.

    received[s] = 1/H Σ_h Σ_t exp(score_ts − logsumexp_t)      over the tokens t to which slot s is visible

There are two passes over the scores. `_logsumexp` computes the logarithm of each token's sum of exponentials, with one
program per tile of tokens, query head and sequence. `_received` adds up the weights of a block of 64 slots over all
tokens, with one program per block, query head and sequence. Both skip blocks that lie entirely in the future. The mean
over heads is computed by PyTorch, and all sums have a fixed order, so that results are bitwise reproducible. Scores and
sums are float32; exponentials are computed to base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effpass.lowering.kernels.running_softmax import scores

__all__ = ["received_attention", "supported"]

_FAR = tl.constexpr(2147483647)
_BLOCK = 64  # slots per tile


def supported(query: Tensor, keys: Tensor) -> bool:
    """Return whether the kernel supports `query` [B, H, T, K]: head sizes from 16 to 256, one dtype."""
    return (
        query.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and keys.dtype == query.dtype
        and 16 <= query.shape[-1] <= 256
        and keys.stride(-1) == 1
        and query.numel() > 0
        and keys.shape[2] > 0
    )


def received_attention(
    query: Tensor, keys: Tensor, key_positions: Tensor, query_positions: Tensor, scale: float, softcap: float
) -> Tensor:
    """Run `effpass::received_attention` on tensors that are :func:`supported`."""
    (batch, heads, tokens, size), (_, groups, slots, _) = query.shape, keys.shape
    query = query if query.stride(-1) == 1 else query.contiguous()
    key_positions, query_positions = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (key_positions, query_positions)
    )
    shape = tile_shape(size, query.element_size())
    options = {"num_warps": shape.pop("num_warps"), "num_stages": shape.pop("num_stages")}
    earliest = _of_blocks(torch.where(key_positions < 0, _FAR.value, key_positions), _BLOCK, _FAR.value).amin(2)
    latest = _of_blocks(query_positions, shape["BLOCK_M"], -1).amax(2)
    sums = torch.empty((batch, heads, tokens), dtype=torch.float32, device=query.device)
    parts = torch.empty((batch, heads, slots), dtype=torch.float32, device=query.device)
    strides = (
        *query.stride()[:3], *keys.stride()[:3], key_positions.stride(0), query_positions.stride(0), tokens, slots,
    )  # fmt: skip
    constants = {"HEADS": heads, "REPEAT": heads // groups, "KEY": size, "SOFTCAP": softcap != 0, **shape}
    _logsumexp[(triton.cdiv(tokens, shape["BLOCK_M"]), heads, batch)](
        query, keys, key_positions, query_positions, earliest, sums, *strides, earliest.shape[1], scale, softcap,
        **constants, **options,
    )  # fmt: skip
    _received[(triton.cdiv(slots, _BLOCK), heads, batch)](
        query, keys, key_positions, query_positions, latest, sums, parts, *strides, latest.shape[1], scale, softcap,
        **constants, **options,
    )  # fmt: skip
    return parts.mean(1)


def tile_shape(size: int, element_size: int) -> dict[str, int]:
    """Return the tile sizes, the warps per program and the stages of the pipeline of loads."""
    block_k = max(16, triton.next_power_of_2(size))
    is_narrow = block_k * element_size <= 256
    return {
        "BLOCK_M": 128 if is_narrow else 32,
        "BLOCK_N": _BLOCK,
        "BLOCK_K": block_k,
        "num_warps": 8 if is_narrow else 4,
        "num_stages": 3 if is_narrow else 2,
    }


def _of_blocks(positions: Tensor, block: int, empty: int) -> Tensor:
    """Split positions [B, T] into [B, blocks, block], padded with `empty`."""
    padding = -positions.shape[1] % block
    return torch.nn.functional.pad(positions, (0, padding), value=empty).unflatten(1, (-1, block))


@triton.jit(do_not_specialize=["tokens", "slots", "blocks"])
def _logsumexp(
    query, keys, key_positions, query_positions, earliest, sums, query_b, query_h, query_t, keys_b, keys_h, keys_s,
    key_positions_b, query_positions_b, tokens, slots, blocks, scale, softcap, HEADS: tl.constexpr,
    REPEAT: tl.constexpr, KEY: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    # The last tokens see the most slots, so their programs start first.
    tile, head, b = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    token, dk, span = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    live = token < tokens
    query += b * query_b + head * query_h
    keys += b * keys_b + head // REPEAT * keys_h
    key_positions += b * key_positions_b
    of_queries = tl.load(query_positions + b * query_positions_b + token, mask=live, other=-1)
    last = tl.max(of_queries, 0)
    end = 0
    for first in range(0, blocks, 512):
        block = first + tl.arange(0, 512)
        low = tl.load(earliest + b * blocks + block, mask=block < blocks, other=_FAR)
        end = tl.maximum(end, tl.max(tl.where(low <= last, block + 1, 0), 0))
    q = tl.load(
        query + token.to(tl.int64)[:, None] * query_t + dk[None, :], mask=live[:, None] & (dk < KEY)[None, :], other=0
    )
    best = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for block in range(0, end):
        slot = block * BLOCK_N + span
        there = slot < slots
        k = tl.load(
            keys + slot.to(tl.int64)[None, :] * keys_s + dk[:, None], mask=there[None, :] & (dk < KEY)[:, None], other=0
        )
        of_keys = tl.load(key_positions + slot, mask=there, other=-1)
        visible = (of_keys >= 0)[None, :] & (of_keys[None, :] <= of_queries[:, None])
        score = tl.where(visible, scores(q, k, scale, softcap, SOFTCAP), float("-inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        total = total * tl.exp2(best - higher) + tl.sum(tl.exp2(score - higher[:, None]), 1)
        best = higher
    # A token that sees nothing gets infinity, so that its weights exp2(x - inf) are 0.
    logsumexp = tl.where(total > 0, best + tl.log2(tl.where(total > 0, total, 1)), float("inf"))
    tl.store(sums + (b * HEADS + head) * tokens + token, logsumexp, mask=live)


@triton.jit(do_not_specialize=["tokens", "slots", "blocks"])
def _received(
    query, keys, key_positions, query_positions, latest, sums, parts, query_b, query_h, query_t, keys_b, keys_h, keys_s,
    key_positions_b, query_positions_b, tokens, slots, blocks, scale, softcap, HEADS: tl.constexpr,
    REPEAT: tl.constexpr, KEY: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    # The first slots are seen by the most tokens, so their programs start first.
    tile, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot, dk, span = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
    there = slot < slots
    query += b * query_b + head * query_h
    query_positions += b * query_positions_b
    sums += (b * HEADS + head) * tokens
    of_keys = tl.load(key_positions + b * key_positions_b + slot, mask=there, other=-1)
    first_there = tl.min(tl.where(of_keys >= 0, of_keys, _FAR), 0)
    begin, end = blocks, 0
    for first in range(0, blocks, 512):
        block = first + tl.arange(0, 512)
        high = tl.load(latest + b * blocks + block, mask=block < blocks, other=-1)
        begin = tl.minimum(begin, tl.min(tl.where(high >= first_there, block, _FAR), 0))
        end = tl.maximum(end, tl.max(tl.where(high >= first_there, block + 1, 0), 0))
    k = tl.load(
        keys + b * keys_b + head // REPEAT * keys_h + slot.to(tl.int64)[None, :] * keys_s + dk[:, None],
        mask=there[None, :] & (dk < KEY)[:, None],
        other=0,
    )
    received = tl.zeros([BLOCK_N], tl.float32)
    for block in range(begin, end):
        token = block * BLOCK_M + span
        live = token < tokens
        q = tl.load(
            query + token.to(tl.int64)[:, None] * query_t + dk[None, :],
            mask=live[:, None] & (dk < KEY)[None, :],
            other=0,
        )
        of_queries = tl.load(query_positions + token, mask=live, other=-1)
        logsumexp = tl.load(sums + token, mask=live, other=float("inf"))
        weight = tl.exp2(scores(q, k, scale, softcap, SOFTCAP) - logsumexp[:, None])
        visible = (of_keys >= 0)[None, :] & (of_keys[None, :] <= of_queries[:, None])
        received += tl.sum(tl.where(visible, weight, 0), 0)
    tl.store(parts + (b * HEADS + head) * slots + slot, received, mask=there)
