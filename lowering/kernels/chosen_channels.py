"""Kernels of `chosen_channels`: two products of a few rows, bound by reading the chosen channels' weights.

The first gives the chosen channels of the hidden state, side by side; the second splits the sum over them, so that
there are programs for a whole GPU, and the parts are added in their order. Weights are the tall operand of a tensor
core's product, tokens are padded to 16, 32 or 64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.launch import launch_options, multiprocessors, overlaps

__all__ = ["chosen_channels", "supported"]

_ROWS = 64  # tokens of a program, at most
_OUTPUTS = 64  # of the second product, of a program


def supported(x: Tensor, active: Tensor, up: Tensor, down: Tensor, tile: int) -> bool:
    """Whether there is a kernel: one dtype, contiguous weights, tiles of 16, 32 or 64, widths in 16 bytes."""
    same = (x, active, up, down)
    return (
        x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and all(tensor.dtype == x.dtype and tensor.device == x.device for tensor in same)
        and up.is_contiguous()
        and down.is_contiguous()
        and tile in (16, 32, 64)
        and x.shape[0] > 0
        and x.shape[1] * x.element_size() % 16 == 0
    )


def chosen_channels(x: Tensor, active: Tensor, up: Tensor, down: Tensor, tiles: Tensor, tile: int) -> Tensor:
    """`effpass::chosen_channels` where :func:`supported`."""
    x, active = x.contiguous(), active.contiguous()
    (tokens, width), count, device = x.shape, tiles.shape[0], x.device
    if count == 0:
        return torch.zeros_like(x)
    block_m = 16 if tokens <= 16 else 32 if tokens <= 32 else _ROWS
    rows = triton.cdiv(tokens, block_m)
    hidden = x.new_empty((tokens, count * tile))
    common = {"TILE": tile, "BLOCK_M": block_m, "PDL": overlaps(device)}
    outputs, block_k = min(tile, 32), min(256 // x.element_size(), triton.next_power_of_2(width))
    _up[(count * (tile // outputs), rows)](
        x, active, up, tiles, hidden, tokens, up.shape[0], count * tile, width, BLOCK_N=outputs,
        BLOCK_K=max(16, block_k), **common, **launch_options(device, 4, 4),
    )  # fmt: skip
    blocks = triton.cdiv(width, _OUTPUTS)
    splits = max(1, min(count // 4, round(2 * multiprocessors(device) / (blocks * rows))))
    share = triton.cdiv(count, splits)
    splits = triton.cdiv(count, share)
    parts = x.new_empty((splits, tokens, width), dtype=x.dtype if splits == 1 else torch.float32)
    _down[(blocks, splits, rows)](
        hidden, down, tiles, parts, tokens, width, down.shape[1], count, SHARE=share, BLOCK_N=_OUTPUTS,
        **common, **launch_options(device, 4, 4),
    )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(0).to(x.dtype)


@triton.jit(do_not_specialize=["tokens"])
def _up(
    x, active, up, tiles, hidden, tokens, channels, columns, inner: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    per: tl.constexpr = TILE // BLOCK_N
    number, part = tl.program_id(0) // per, tl.program_id(0) % per
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    inside = part * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.load(tiles + number).to(tl.int64) * TILE + inside
    span, row = tl.arange(0, BLOCK_K), tl.minimum(token, tokens - 1).to(tl.int64)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(0, inner, BLOCK_K):
        there = (k + span < inner)[None, :]
        weight = tl.load(up + channel[:, None] * inner + k + span[None, :], mask=there, other=0)
        value = tl.load(x + row[:, None] * inner + k + span[None, :], mask=there, other=0)
        total = tl.dot(weight, tl.trans(value), total, input_precision="ieee")
    gate = tl.load(active + row[None, :] * channels + channel[:, None])
    product = (gate.to(tl.float32) * total.to(gate.dtype).to(tl.float32)).to(gate.dtype)
    place = row[None, :] * columns + number * TILE + inside[:, None]
    tl.store(hidden + place, product, mask=(token < tokens)[None, :])


@triton.jit(do_not_specialize=["tokens", "count"])
def _down(
    hidden, down, tiles, parts, tokens, width, channels, count, SHARE: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * SHARE
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    inside, row = tl.arange(0, TILE), tl.minimum(token, tokens - 1).to(tl.int64)
    of_weight = tl.minimum(output, width - 1).to(tl.int64)[:, None] * channels + inside[None, :]
    of_hidden = row[:, None] * count * TILE + inside[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for number in range(first, tl.minimum(first + SHARE, count)):
        weight = tl.load(down + of_weight + tl.load(tiles + number).to(tl.int64) * TILE)
        value = tl.load(hidden + of_hidden + number * TILE)
        total = tl.dot(weight, tl.trans(value), total, input_precision="ieee")
    place = (tl.program_id(1).to(tl.int64) * tokens + row[None, :]) * width + output[:, None]
    there = (token < tokens)[None, :] & (output < width)[:, None]
    tl.store(parts + place, total.to(parts.dtype.element_ty), mask=there)
