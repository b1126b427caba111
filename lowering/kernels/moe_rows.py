"""Triton kernels of `effpass::moe_ffn` for few tokens, which read the weights of each pair of token and expert once.

    h[p] = gate(W_gate_up x[t] + b_gate_up)        out[t] = Σ_j weights[t, j] · (W_down h[p] + b_down)

p is the pair of token t with its j-th expert. There are two launches and nothing is sorted. A program of the first
computes some features of h for one pair; a program of the second computes some features of one token's output, with the
products of all its experts in one tile of registers, where they are weighted and added. It reads the experts and loads
their weights before the first launch has ended (:mod:`effpass.lowering.kernels.launch`). All sums are in float32; h and
the output are rounded to the dtype of x.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.launch import launch_options, overlaps
from effpass.lowering.kernels.moe_gate import gate

__all__ = ["first_shape", "moe_ffn", "second_shape"]


def moe_ffn(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    offset: float,
    interleaved: bool,
) -> Tensor:
    """Run `effpass::moe_ffn` without returning the projection, on tensors that `moe_grouped.moe_ffn` accepts."""
    (tokens, width), each, (count, _, inner) = x.shape, experts.shape[1], down.shape
    hidden, out = x.new_empty(tokens * each, inner), torch.empty_like(x)
    pdl: dict[str, Any] = {"PDL": overlaps(x.device)}
    shape = first_shape(width, gate_up.stride(2) == 1)
    options = launch_options(x.device, shape.pop("num_warps"))
    _first[(triton.cdiv(inner, shape["BLOCK_N"]), tokens * each)](
        x, experts, gate_up, gate_up_bias, hidden, *gate_up.stride(), each, alpha, limit, offset, COUNT=count,
        WIDTH=width, INNER=inner, ACTIVATION=activation, LIMITED=limit != 0, INTERLEAVED=interleaved, **shape, **pdl,
        **options,
    )  # fmt: skip
    shape = second_shape(inner, each, down.stride(2) == 1)
    options = launch_options(x.device, shape.pop("num_warps"))
    _second[(triton.cdiv(width, shape["BLOCK_N"]), tokens)](
        hidden, experts, weights, down, down_bias, out, *down.stride(), COUNT=count, WIDTH=width, INNER=inner,
        EACH=each, SLOTS=triton.next_power_of_2(each), **shape, **pdl, **options,
    )  # fmt: skip
    return out


def first_shape(width: int, rows_contiguous: bool) -> dict[str, int]:
    """Return the tile of the first launch: few features and long loads, or the reverse for transposed weights."""
    if not rows_contiguous:
        return {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4}
    block_k = _length(width, 2048)
    return {"BLOCK_N": max(1, 2048 // block_k), "BLOCK_K": block_k, "num_warps": 4}


def second_shape(inner: int, each: int, rows_contiguous: bool) -> dict[str, int]:
    """Return the tile of the second launch, with 8 or 4 loads of 16 bytes per thread and step."""
    slots = triton.next_power_of_2(each)
    if not rows_contiguous:
        return {"BLOCK_N": 64, "BLOCK_K": max(8, 64 // slots), "num_warps": 4}
    block_k = _length(inner, 4096 // slots)
    block_n = max(1, 4096 // (slots * block_k))
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": max(1, min(8, slots * block_n * block_k // 1024))}


def _length(size: int, most: int) -> int:
    """Return the largest power of two up to `most` that pads `size` least; short sizes are not split."""
    if size <= 256:
        return triton.next_power_of_2(max(size, 16))
    lengths = [n for n in (256, 512, 1024, 2048, 4096) if n <= max(most, 256)]
    return min(lengths, key=lambda n: (triton.cdiv(size, n) * n, -n))


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["each"])
def _first(
    x, experts, gate_up, bias, hidden, stride_e, stride_n, stride_k, each, alpha, limit, offset, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, INNER: tl.constexpr, ACTIVATION: tl.constexpr, LIMITED: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1)
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()  # after the wait, so that the next kernel may read what was written before this launch
    expert = tl.load(experts + pair).to(tl.int64)
    if expert < COUNT:
        feature = tl.minimum(n, INNER - 1)
        of_gate = feature * 2 if INTERLEAVED else feature
        of_up = feature * 2 + 1 if INTERLEAVED else feature + INNER
        gate_up += expert * stride_e
        gates = gate_up + of_gate[:, None] * stride_n + k[None, :] * stride_k
        ups = gate_up + of_up[:, None] * stride_n + k[None, :] * stride_k
        x += (pair // each).to(tl.int64) * WIDTH
        inside = k < WIDTH
        gate_tile = tl.load(gates, mask=inside[None, :], other=0)
        up_tile = tl.load(ups, mask=inside[None, :], other=0)
        value = tl.load(x + k, mask=inside, other=0)
        gate_sum = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        up_sum = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for at in range(BLOCK_K, WIDTH + BLOCK_K, BLOCK_K):
            # Load the next tile while this one is processed.
            following = at + k < WIDTH
            next_gate = tl.load(gates + at * stride_k, mask=following[None, :], other=0)
            next_up = tl.load(ups + at * stride_k, mask=following[None, :], other=0)
            next_value = tl.load(x + at + k, mask=following, other=0)
            wide = value.to(tl.float32)[None, :]
            gate_sum += gate_tile.to(tl.float32) * wide
            up_sum += up_tile.to(tl.float32) * wide
            gate_tile, up_tile, value = next_gate, next_up, next_value
        g, u = tl.sum(gate_sum, 1), tl.sum(up_sum, 1)
        if bias is not None:
            g += tl.load(bias + expert * 2 * INNER + of_gate).to(tl.float32)
            u += tl.load(bias + expert * 2 * INNER + of_up).to(tl.float32)
        h = gate(g, u, alpha, limit, offset, ACTIVATION, LIMITED)
        tl.store(hidden + pair.to(tl.int64) * INNER + n, h.to(hidden.dtype.element_ty), mask=n < INNER)


@triton.jit
def _second(
    hidden, experts, weights, down, bias, out, stride_e, stride_n, stride_k, COUNT: tl.constexpr, WIDTH: tl.constexpr,
    INNER: tl.constexpr, EACH: tl.constexpr, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1)
    n, k, j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, SLOTS)
    # The preceding launch let this one start after its own wait, so expert ids and router weights are complete.
    expert = tl.load(experts + token * EACH + j, mask=j < EACH, other=COUNT).to(tl.int64)
    here = expert < COUNT
    expert = tl.where(here, expert, 0)
    feature = tl.minimum(n, WIDTH - 1)
    rows = down + expert[:, None] * stride_e + feature[None, :] * stride_n
    tiles = rows[:, :, None] + k[None, None, :] * stride_k
    values = hidden + (token * EACH + j).to(tl.int64)[:, None] * INNER + k[None, :]
    inside = here[:, None] & (k < INNER)[None, :]
    tile = tl.load(tiles, mask=inside[:, None, :], other=0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    value = tl.load(values, mask=inside, other=0)
    total = tl.zeros([SLOTS, BLOCK_N, BLOCK_K], tl.float32)
    for at in range(BLOCK_K, INNER + BLOCK_K, BLOCK_K):
        following = here[:, None] & (at + k < INNER)[None, :]
        next_tile = tl.load(tiles + at * stride_k, mask=following[:, None, :], other=0)
        next_value = tl.load(values + at, mask=following, other=0)
        total += tile.to(tl.float32) * value.to(tl.float32)[:, None, :]
        tile, value = next_tile, next_value
    outputs = tl.sum(total, 2)
    if bias is not None:
        outputs += tl.load(bias + expert[:, None] * WIDTH + feature[None, :]).to(tl.float32)
    weight = tl.load(weights + token * EACH + j, mask=here, other=0).to(tl.float32)
    result = tl.sum(tl.where(here[:, None], outputs * weight[:, None], 0), 0)
    tl.store(out + token.to(tl.int64) * WIDTH + n, result.to(out.dtype.element_ty), mask=n < WIDTH)
