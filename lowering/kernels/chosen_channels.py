"""Triton kernels of `effpass::chosen_channels` and `effpass::largest_channels`, bound by reading the chosen weights.

    h_tc = a_tc (w_up,c · x_t)        out_t = Σ_c h_tc w_down,c        over the M chosen channels c

`_up` computes h [T, M], with one program per 32 channels and tile of tokens. `_down` splits the sum over channels so
that programs fill the GPU; each program computes a partial sum of some output features, and the partial sums are added
in order by PyTorch. A channel is a contiguous row of both weights, which are the tall operand of the tensor cores;
tokens are padded to 16, 32 or 64. Products and partial sums accumulate in float32 without TF32; w_up · x, h and the
output are rounded to the dtype of x. `_largest` chooses channels in a single program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.largest import MOST, NEVER, choose, in_order
from effpass.lowering.kernels.launch import launch_options, multiprocessors, overlaps

__all__ = ["chosen_channels", "largest_channels", "searches", "supported"]


def searches(energy: Tensor) -> bool:
    """Return whether the kernel of `largest_channels` applies: up to 16384 contiguous channels in float32."""
    return energy.dtype == torch.float32 and energy.is_contiguous() and energy.shape[0] <= MOST


def largest_channels(energy: Tensor, count: int) -> Tensor:
    """Run `effpass::largest_channels` on an `energy` for which :func:`searches` is true."""
    chosen = torch.empty(count, dtype=torch.int32, device=energy.device)
    channels = energy.shape[0]
    _largest[(1,)](
        energy, chosen, channels, count, ALL=triton.next_power_of_2(channels), PDL=overlaps(energy.device),
        **launch_options(energy.device, 16),
    )  # fmt: skip
    return chosen


def supported(x: Tensor, active: Tensor, up: Tensor, down: Tensor) -> bool:
    """Return whether the kernels apply: one dtype, channels contiguous, hidden size a multiple of 16 bytes."""
    same = (x, active, up, down)
    return (
        x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and all(tensor.dtype == x.dtype and tensor.device == x.device for tensor in same)
        and up.is_contiguous()
        and down.t().is_contiguous()
        and x.shape[0] > 0
        and x.shape[1] * x.element_size() % 16 == 0
    )


def chosen_channels(x: Tensor, active: Tensor, up: Tensor, down: Tensor, channels: Tensor) -> Tensor:
    """Run `effpass::chosen_channels` on tensors that are :func:`supported`."""
    x, active = x.contiguous(), active.contiguous()
    (tokens, width), count, device = x.shape, channels.shape[0], x.device
    if count == 0:
        return torch.zeros_like(x)
    block_m = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    rows, is_wide = triton.cdiv(tokens, block_m), x.element_size() == 4
    hidden = x.new_empty((tokens, count))
    block_k = max(16, min(64 if is_wide else 128, triton.next_power_of_2(width)))
    _up[(triton.cdiv(count, 32), rows)](
        x, active, up, channels, hidden, tokens, up.shape[0], count, width, BLOCK_M=block_m, BLOCK_N=32,
        BLOCK_K=block_k, PDL=overlaps(device), **launch_options(device, 4, 4),
    )  # fmt: skip
    block_n, block_c = 64 if is_wide else 128, 32 if is_wide else 64
    blocks, steps = triton.cdiv(width, block_n), triton.cdiv(count, block_c)
    wanted = max(1, min(steps // 2, round(2 * multiprocessors(device) / (blocks * rows))))
    share = triton.cdiv(steps, wanted)
    splits = triton.cdiv(steps, share)
    parts = x.new_empty((splits, tokens, width), dtype=x.dtype if splits == 1 else torch.float32)
    _down[(blocks, splits, rows)](
        hidden, down, channels, parts, tokens, width, count, SHARE=share * block_c, BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_C=block_c, PDL=overlaps(device), **launch_options(device, 4, 4),
    )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(0).to(x.dtype)


@triton.jit(do_not_specialize=["channels", "count"])
def _largest(energy, chosen, channels, count, ALL: tl.constexpr, PDL: tl.constexpr):
    place = tl.arange(0, ALL)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    score = tl.load(energy + place, mask=place < channels, other=0)
    is_chosen, rank, _ = choose(tl.where(place < channels, in_order(score), NEVER), count)
    tl.store(chosen + rank, place, mask=is_chosen)


@triton.jit(do_not_specialize=["tokens"])
def _up(
    x, active, up, channels, hidden, tokens, all_channels, count, inner: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    channel = tl.load(channels + tl.minimum(column, count - 1)).to(tl.int64)
    span, row = tl.arange(0, BLOCK_K), tl.minimum(token, tokens - 1).to(tl.int64)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(0, inner, BLOCK_K):
        there = (k + span < inner)[None, :]
        weight = tl.load(up + channel[:, None] * inner + k + span[None, :], mask=there, other=0)
        value = tl.load(x + row[:, None] * inner + k + span[None, :], mask=there, other=0)
        total = tl.dot(weight, tl.trans(value), total, input_precision="ieee")
    gate = tl.load(active + row[None, :] * all_channels + channel[:, None])
    product = (gate.to(tl.float32) * total.to(gate.dtype).to(tl.float32)).to(gate.dtype)
    there = (token < tokens)[None, :] & (column < count)[:, None]
    tl.store(hidden + row[None, :] * count + column[:, None], product, mask=there)


@triton.jit(do_not_specialize=["tokens"])
def _down(
    hidden, down, channels, parts, tokens, width, count, SHARE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * SHARE
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    span, row = tl.arange(0, BLOCK_C), tl.minimum(token, tokens - 1).to(tl.int64)
    inside = (output < width)[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(first, tl.minimum(first + SHARE, count), BLOCK_C):
        column = start + span
        channel = tl.load(channels + column, mask=column < count, other=0).to(tl.int64)
        there = (column < count)[:, None] & inside
        weight = tl.load(down + channel[:, None] * width + output[None, :], mask=there, other=0)
        value = tl.load(hidden + row[:, None] * count + column[None, :], mask=(column < count)[None, :], other=0)
        total = tl.dot(tl.trans(weight), tl.trans(value), total, input_precision="ieee")
    place = (tl.program_id(1).to(tl.int64) * tokens + row[None, :]) * width + output[:, None]
    there = (token < tokens)[None, :] & (output < width)[:, None]
    tl.store(parts + place, total.to(parts.dtype.element_ty), mask=there)
