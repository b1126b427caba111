"""Triton kernel of `effpass::top_tokens`: the k most probable tokens and the entropy of each row of logits.

    log p_i = x_i − log Σ_j exp x_j        H = −Σ_j p_j log p_j

In one launch, programs process parts of up to 2048 logits of a row, and the last program of a row to finish merges
them. A logit, as float32, and its index form one int64 whose order is that of the logits, with smaller indices first
among equals. Each part leaves its best k of these, its highest logit m, and the sums of exp(x − m) and of
exp(x − m) (x − m), in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.largest import in_order, largest
from effpass.lowering.kernels.launch import counters, launch_options, overlaps

__all__ = ["supported", "top_tokens"]

_MOST_TOKENS, _MOST_FOUND = 32, 4096


def supported(logits: Tensor, k: int) -> bool:
    """Return whether the kernel applies: k up to 32, contiguous rows, and a vocabulary whose parts can be merged."""
    return (
        logits.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and k <= _MOST_TOKENS
        and logits.stride(1) == 1
        and 0 < logits.shape[0] < 65536
        and logits.shape[1] <= 2048 * _MOST_FOUND // triton.next_power_of_2(k)
    )


def top_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Run `effpass::top_tokens` on logits that are :func:`supported`."""
    (rows, vocabulary), device = logits.shape, logits.device
    width = triton.next_power_of_2(k)
    size = 2048 if vocabulary > 1024 else max(16, width, triton.next_power_of_2(vocabulary))
    parts = triton.cdiv(vocabulary, size)
    keys = torch.empty((rows, parts, width), dtype=torch.long, device=device)
    sums = torch.empty((rows, 3, parts), dtype=torch.float32, device=device)
    values = torch.empty((rows, k), dtype=torch.float32, device=device)
    tokens, entropy = torch.empty((rows, k), dtype=torch.long, device=device), values.new_empty(rows)
    _top[(parts, rows)](
        logits, keys, sums, values, tokens, entropy, counters(device, rows), vocabulary, parts, logits.stride(0), K=k,
        WIDTH=width, SIZE=size, FOUND=triton.next_power_of_2(parts * width), PARTS=triton.next_power_of_2(parts),
        PDL=overlaps(device), **launch_options(device, 4),
    )  # fmt: skip
    return values, tokens, entropy


@triton.jit(do_not_specialize=["vocabulary", "parts"])
def _top(
    logits, keys, sums, values, tokens, entropy, done, vocabulary, parts, stride_of_row, K: tl.constexpr,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, FOUND: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    part, row = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    index = part * SIZE + tl.arange(0, SIZE)
    inside = index < vocabulary
    x = tl.load(logits + row.to(tl.int64) * stride_of_row + index, mask=inside, other=float("-inf")).to(tl.float32)
    highest = tl.max(x, 0)
    anchor = tl.where(highest == float("-inf"), 0.0, highest)  # the part has no probability at all
    weight = tl.exp(x - anchor)
    below = tl.where(weight > 0, x - anchor, 0.0)
    order = tl.where(inside, (in_order(x).to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64), -(1 << 63))
    found = largest(order, WIDTH)
    tl.store(keys + (row.to(tl.int64) * parts + part) * WIDTH + tl.arange(0, WIDTH), found)
    sums += row * 3 * parts
    tl.store(sums + part, anchor)
    tl.store(sums + parts + part, tl.sum(weight, 0))
    tl.store(sums + 2 * parts + part, tl.sum(weight * below, 0))
    tl.debug_barrier()  # the counter must be incremented after the stores of all threads
    if tl.atomic_add(done + row, 1, sem="acq_rel") == parts - 1:
        tl.store(done + row, 0)
        p = tl.arange(0, PARTS)
        there = p < parts
        mass = tl.load(sums + parts + p, mask=there, other=0, cache_modifier=".cg")
        anchors = tl.load(sums + p, mask=there, other=0, cache_modifier=".cg")
        of_anchors = tl.load(sums + 2 * parts + p, mask=there, other=0, cache_modifier=".cg")
        top = tl.max(tl.where(mass > 0, anchors, float("-inf")), 0)
        share = tl.where(mass > 0, tl.exp(anchors - top), 0.0)
        whole = tl.sum(share * mass, 0)
        log_whole = tl.log(whole)
        tl.store(entropy + row, log_whole - tl.sum(share * (of_anchors + (anchors - top) * mass), 0) / whole)
        f = tl.arange(0, FOUND)
        of_row = keys + row.to(tl.int64) * parts * WIDTH
        every = tl.load(of_row + f, mask=f < parts * WIDTH, other=-(1 << 63), cache_modifier=".cg")
        best = largest(every, WIDTH)
        token = 0x7FFFFFFF - (best & 0xFFFFFFFF)
        bits = (best >> 32).to(tl.int32)
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        value = bits.to(tl.float32, bitcast=True)
        k = tl.arange(0, WIDTH)
        tl.store(tokens + row.to(tl.int64) * K + k, token, mask=k < K)
        tl.store(values + row.to(tl.int64) * K + k, value - top - log_whole, mask=k < K)
