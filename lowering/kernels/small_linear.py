"""Triton kernels of `fused_linear` and `gated_linear` for up to 64 tokens, bound by reading the weights.

    yᵢ = Wᵢ n(x) + bᵢ (+ residual)        y = act(W_gate n(x)) · W_up n(x)
    n(x) = w ⊙ x / √(mean(x²) + ε)  with w = offset + norm_weight;  without a norm weight n(x) = x

The products of one token are computed in float32, with a few outputs per program. Several tokens are padded to 16, 32
or 64 and use tensor cores, with the weights as the tall operand and accumulation in float32; w ⊙ x is rounded to the
dtype of x for them. If the inner dimension is short, a program holds whole rows of the weights, else it runs over their
columns in a loop. It starts to load (or prefetch) its weights before it waits for the preceding launch
(:mod:`effpass.lowering.kernels.launch`).

RMSNorm takes no extra pass: y = (Σ_k W_k w_k x_k) / √(mean(x²) + ε), with both sums in one loop. If there are too few
outputs to keep the GPU busy, the inner dimension is split, and the last program of a tile adds the partial sums in
their order, so that results do not depend on which one was last. Outputs are rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.launch import (
    counters,
    interpreted,
    launch_options,
    multiprocessors,
    overlaps,
    shared_memory,
)

__all__ = ["MOST_ROWS", "fused_linear", "gated_linear", "supported"]

MOST_ROWS = 64  # maximum number of tokens
_BESIDE = 3072  # bytes of shared memory that reductions may need beside tiles
_LONG = 2048  # inner size from which several tokens are read by one program per multiprocessor


def supported(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None,
) -> bool:
    """Return whether the kernels apply: up to 64 tokens and three contiguous weights, one dtype, 16-byte alignment.

    In float16 with several tokens, the caller must apply the norm: x times the norm weight is rounded before it is
    divided by the statistics, and may leave the range of float16.
    """
    rows, width = x.numel() // max(x.shape[-1], 1), x.shape[-1]
    same = [*weights, *(bias for bias in biases if bias is not None), *([] if residual is None else [residual])]
    return (
        0 < rows <= MOST_ROWS
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and width * x.element_size() % 16 == 0
        and len(weights) <= 3
        and all(tensor.dtype == x.dtype and tensor.device == x.device for tensor in same)
        and all(weight.is_contiguous() and 0 < weight.numel() < 2**31 for weight in weights)
        and all(weight.data_ptr() % 16 == 0 for weight in weights)
    )


def fused_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm_weight: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    residual: Tensor | None,
) -> list[Tensor]:
    """Run `effpass::fused_linear` on tensors that are :func:`supported`."""
    rows = x.reshape(-1, x.shape[-1])
    outputs = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    if residual is not None:
        residual = residual.contiguous()
    _launch(rows, weights, biases, norm_weight, norm_eps, norm_offset, residual, outputs, "")
    return outputs


def gated_linear(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    activation: str,
) -> Tensor:
    """Run `effpass::gated_linear` on tensors that are :func:`supported`."""
    rows = x.reshape(-1, x.shape[-1])
    output = x.new_empty((*x.shape[:-1], gate.shape[0]))
    _launch(rows, [gate, up], [None, None], norm_weight, norm_eps, norm_offset, None, [output], activation)
    return output


def _launch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm_weight: Tensor | None,
    eps: float,
    offset: float,
    residual: Tensor | None,
    outputs: Sequence[Tensor],
    activation: str,
) -> None:
    x = x.contiguous()
    (rows, inner), gated = x.shape, bool(activation)
    sizes = [output.shape[-1] for output in outputs]
    padding = (None,) * (3 - len(weights))
    tensors = (x, *weights, *padding, *biases, *padding, norm_weight, residual, *outputs, *(None,) * (3 - len(outputs)))
    numbers = (*sizes, *(0,) * (3 - len(sizes)), inner, eps, offset)
    common: dict[str, Any] = {"ACTIVATION": activation, "PDL": overlaps(x.device)}
    if rows == 1:
        shape = one_row_shape(inner, sum(sizes), gated, x.device)
        grid = (sum(triton.cdiv(size, shape["BLOCK_N"]) for size in sizes),)
        options = launch_options(x.device, shape.pop("num_warps"))
        _one_row[grid](*tensors, *numbers, **shape, **common, **options)
        return
    whole = whole_rows_shape(rows, inner, sizes, gated, x.element_size(), x.device)
    if whole is not None:
        grid = (sum(triton.cdiv(size, whole["BLOCK_N"]) for size in sizes),)
        options = launch_options(x.device, whole.pop("num_warps"))
        _whole_rows[grid](*tensors, rows, *numbers, **whole, **common, **options)
        return
    shape = few_rows_shape(rows, inner, sizes, gated, x.element_size(), x.device)
    tiles, splits = sum(triton.cdiv(size, shape["BLOCK_N"]) for size in sizes), shape["SPLITS"]
    parts = done = None
    if splits > 1:
        columns = shape["BLOCK_N"] * (2 if gated else 1) + 1  # one more for the sums of squares
        parts = x.new_empty((tiles, splits, columns, shape["BLOCK_M"]), dtype=torch.float32)
        done = counters(x.device, tiles)
    options = launch_options(x.device, shape.pop("num_warps"), shape.pop("num_stages"))
    _few_rows[(tiles, splits)](*tensors, parts, done, rows, *numbers, **shape, **common, **options)


def one_row_shape(inner: int, outputs: int, gated: bool, device: torch.device) -> dict[str, int]:
    """Return the tile for one token: few outputs, and one or two loads of 16 bytes per thread and output."""
    if inner <= 1024:
        block_n, block_k = 8 if outputs > 64 * multiprocessors(device) else 4, triton.next_power_of_2(inner)
    elif gated:
        block_n, block_k = 2, 1024 if inner < 4096 else 4096
    else:
        block_n, block_k = 2, 1024 if inner == 2048 else 2048
    block_n //= 2 if gated else 1  # per weight
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": max(1, min(block_k // 256, 8))}


def whole_rows_shape(
    rows: int, inner: int, sizes: Sequence[int], gated: bool, element_size: int, device: torch.device
) -> dict[str, int] | None:
    """Return the tile for up to 32 tokens if programs are to hold whole rows of the weights, else None.

    They hold the rows of 64 outputs if these fit into shared memory; otherwise of 16, whose columns are dealt out to
    the warps, which would otherwise repeat one another's products. More outputs than two such programs per
    multiprocessor, and gated ones that don't fit, are better served by a loop.
    """
    if rows > 32 or inner >= _LONG or not (element_size == 2 or interpreted()):
        return None
    block_m, first = 16 if rows <= 16 else 32, 1 << (inner.bit_length() - 1)
    rest = triton.next_power_of_2(inner - first) if inner > first else 0
    for block_n, parts in ((64, 1), (16, 4)):
        columns = block_n * (2 if gated else 1) + block_m
        if columns * (first + rest) * element_size > shared_memory(device) - _BESIDE:
            continue
        tiles = sum(triton.cdiv(size, block_n) for size in sizes)
        if tiles > 2 * multiprocessors(device) or (gated and parts > 1):
            break
        return {
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "FIRST": max(first, 16 * parts),
            "REST": max(rest, 16 * parts) if rest else 0,
            "PARTS": parts,
            "num_warps": 4,
        }
    return None


def few_rows_shape(
    rows: int, inner: int, sizes: Sequence[int], gated: bool, element_size: int, device: torch.device
) -> dict[str, int]:
    """Return the tile for several tokens, and into how many parts the inner dimension is split.

    A long inner dimension is read by one program per multiprocessor, with most of its shared memory in flight; more
    tiles than that are made wider, and fewer are split. A short one is read by two programs per multiprocessor. Adding
    the parts costs microseconds; gated products are therefore left whole for fewer tiles already.
    """
    tiles, room = sum(triton.cdiv(size, 64) for size in sizes), multiprocessors(device)
    block_m, block_n, num_warps = 16 if rows <= 16 else 32 if rows <= 32 else 64, 64, 4
    if inner < _LONG:
        whole, programs = tiles >= (room // 2 if gated else 2 * room), 2 * room
        block_k, stages = (256, 2) if gated and whole else (128, 4)
        if gated and rows > 32:
            block_k, stages = 128, 3
        if whole and (inner % 128 or (gated and rows > 16 and tiles > room)):
            block_k, stages = 64, 6
    elif tiles > room:
        whole, programs, block_n = True, room, 128
        block_k, num_warps, stages = (64, 4, 4) if gated or rows > 32 else (128, 8, 4)
    else:
        whole, programs = gated and tiles >= room // 2, room
        block_k, stages = (128, 4) if gated else (256, 3)
    block_k = min(block_k * 2 // element_size, triton.next_power_of_2(inner))
    limit, columns = shared_memory(device) - _BESIDE, block_n * (2 if gated else 1) + block_m
    while 2 * columns * block_k * element_size > limit:  # two stages at least
        block_k //= 2
    steps = triton.cdiv(inner, block_k)
    wanted = 1 if whole else max(1, min(round(programs / tiles), inner // block_k))
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "SPLITS": triton.cdiv(steps, triton.cdiv(steps, wanted)),
        "num_warps": num_warps,
        "num_stages": min(stages, limit // (columns * block_k * element_size)),
    }


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _tanh(x):
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x / (1 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * x * (1 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        return tl.maximum(x, 0)


@triton.jit
def _bias(b, rows, size, BLOCK_N: tl.constexpr):
    if b is None:
        return tl.zeros([BLOCK_N], tl.float32)
    else:
        return tl.load(b + rows, mask=rows < size, other=0).to(tl.float32)


@triton.jit
def _tile_of(tile, w0, w1, w2, b0, b1, b2, y0, y1, y2, n0, n1, n2, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr):
    """The weight, output, size and first row of a tile, and the bias of its rows."""
    w, y, size, first = w0, y0, n0, tile * BLOCK_N
    bias = tl.zeros([BLOCK_N], tl.float32)
    if ACTIVATION == "":
        span = tl.arange(0, BLOCK_N)
        before = tl.cdiv(n0, BLOCK_N)
        if tile < before:
            bias = _bias(b0, first + span, n0, BLOCK_N)
        if w1 is not None:
            both = before + tl.cdiv(n1, BLOCK_N)
            if tile >= before:
                w, y, size, first = w1, y1, n1, (tile - before) * BLOCK_N
                if tile < both:
                    bias = _bias(b1, first + span, n1, BLOCK_N)
            if w2 is not None:  # noqa: SIM102  (resolved when the kernel is compiled)
                if tile >= both:
                    w, y, size, first = w2, y2, n2, (tile - both) * BLOCK_N
                    bias = _bias(b2, first + span, n2, BLOCK_N)
    return w, y, size, first, bias


@triton.jit(do_not_specialize=["n0", "n1", "n2"])
def _one_row(
    x, w0, w1, w2, b0, b1, b2, norm, residual, y0, y1, y2, n0, n1, n2, inner: tl.constexpr, eps, offset,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    w, y, size, first, bias = _tile_of(
        tile, w0, w1, w2, b0, b1, b2, y0, y1, y2, n0, n1, n2, ACTIVATION, BLOCK_N
    )  # fmt: skip
    rows = first + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    offsets = tl.minimum(rows, size - 1)[:, None] * inner + columns[None, :]
    gated: tl.constexpr = ACTIVATION != ""
    even: tl.constexpr = inner % BLOCK_K == 0
    inside = columns < inner
    if PDL:
        gdc_launch_dependents()
    weight = tl.load(w + offsets) if even else tl.load(w + offsets, mask=inside[None, :], other=0)
    if gated:
        weight_up = tl.load(w1 + offsets) if even else tl.load(w1 + offsets, mask=inside[None, :], other=0)
    if norm is not None:
        scale = tl.load(norm + columns, mask=inside, other=0)
    if PDL:
        gdc_wait()
    value = tl.load(x + columns) if even else tl.load(x + columns, mask=inside, other=0)
    added = bias
    if residual is not None:  # loaded here, where nothing waits for it yet
        added += tl.load(residual + rows, mask=rows < size, other=0).to(tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    total_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for k in range(BLOCK_K, inner + BLOCK_K, BLOCK_K):
        # Load the next tile while this one is processed.
        following = k + columns < inner
        next_weight = tl.load(w + offsets + k, mask=following[None, :], other=0)
        next_value = tl.load(x + columns + k, mask=following, other=0)
        if gated:
            next_up = tl.load(w1 + offsets + k, mask=following[None, :], other=0)
        wide = value.to(tl.float32)
        if norm is not None:
            next_scale = tl.load(norm + columns + k, mask=following, other=0)
            squares += wide * wide
            wide *= offset + scale.to(tl.float32)
            scale = next_scale
        total += weight.to(tl.float32) * wide[None, :]
        if gated:
            total_up += weight_up.to(tl.float32) * wide[None, :]
            weight_up = next_up
        weight, value = next_weight, next_value
    result = tl.sum(total, 1)
    factor = 1.0
    if norm is not None:
        factor = tl.rsqrt(tl.sum(squares, 0) / inner + eps)
    if gated:
        result = _activate(result * factor, ACTIVATION) * (tl.sum(total_up, 1) * factor)
    else:
        result = result * factor + added
    tl.store(y + rows, result.to(y.dtype.element_ty), mask=rows < size)


@triton.jit
def _down(x, PARTS: tl.constexpr):
    """A column of a matrix, or of each of `PARTS` matrices."""
    if PARTS == 1:
        return x[:, None]
    else:
        return x[None, :, None]


@triton.jit
def _across(first, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """`WIDTH` consecutive numbers as a row of a matrix, or dealt out to the rows of `PARTS` matrices."""
    part: tl.constexpr = WIDTH // PARTS
    if PARTS == 1:
        return first + tl.arange(0, WIDTH)[None, :]
    else:
        return first + (tl.arange(0, PARTS) * part)[:, None, None] + tl.arange(0, part)[None, None, :]


@triton.jit
def _squares(x, PARTS: tl.constexpr):
    if PARTS == 1:
        return tl.sum(x * x, 1)
    else:
        return tl.sum(tl.sum(x * x, 2), 0)


@triton.jit
def _times(weight, value, total, PARTS: tl.constexpr):
    """`total` and the products [N, M] of `weight` [N, K] and `value` [M, K], or those of `PARTS` such matrices."""
    if PARTS == 1:
        return tl.dot(weight, tl.trans(value), total, input_precision="ieee")
    else:
        return tl.dot(weight, tl.permute(value, (0, 2, 1)), total, input_precision="ieee")


@triton.jit
def _scaled(value, scale, offset, square, PARTS: tl.constexpr):
    """`value` times the norm's weight, in its dtype, and the sums of its squares."""
    wide = value.to(tl.float32)
    return (wide * (offset + scale.to(tl.float32))).to(value.dtype), square + _squares(wide, PARTS)


@triton.jit(do_not_specialize=["count", "n0", "n1", "n2"])
def _whole_rows(
    x, w0, w1, w2, b0, b1, b2, norm, residual, y0, y1, y2, count, n0, n1, n2, inner: tl.constexpr, eps, offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    w, y, size, first, bias = _tile_of(
        tl.program_id(0), w0, w1, w2, b0, b1, b2, y0, y1, y2, n0, n1, n2, ACTIVATION, BLOCK_N
    )  # fmt: skip
    gated: tl.constexpr = ACTIVATION != ""
    rows, tokens = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    of_weight = _down(tl.minimum(rows, size - 1) * inner, PARTS)
    of_x = _down(tl.minimum(tokens, count - 1) * inner, PARTS)
    # The columns are two ranges of powers of two.
    columns, others = _across(0, FIRST, PARTS), _across(FIRST, REST if REST > 0 else PARTS, PARTS)
    if PDL:
        gdc_launch_dependents()
    weight = tl.load(w + of_weight + columns)
    if gated:
        weight_up = tl.load(w1 + of_weight + columns)
    if norm is not None:
        scale = tl.load(norm + columns)
    if REST > 0:
        other_weight = tl.load(w + of_weight + others, mask=others < inner, other=0)
        if gated:
            other_weight_up = tl.load(w1 + of_weight + others, mask=others < inner, other=0)
        if norm is not None:
            other_scale = tl.load(norm + others, mask=others < inner, other=0)
    if PDL:
        gdc_wait()
    value = tl.load(x + of_x + columns)
    if REST > 0:
        other_value = tl.load(x + of_x + others, mask=others < inner, other=0)
    places = tokens[None, :] * size + rows[:, None]
    inside_y = (tokens < count)[None, :] & (rows < size)[:, None]
    added = tl.zeros([BLOCK_N, BLOCK_M], tl.float32) + bias[:, None]
    if residual is not None:  # loaded here, where nothing waits for it yet
        added += tl.load(residual + places, mask=inside_y, other=0).to(tl.float32)
    square = tl.zeros([BLOCK_M], tl.float32)
    if norm is not None:
        value, square = _scaled(value, scale, offset, square, PARTS)
    if PARTS == 1:
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        total = tl.zeros([PARTS, BLOCK_N, BLOCK_M], tl.float32)
    total_up = total
    total = _times(weight, value, total, PARTS)
    if gated:
        total_up = _times(weight_up, value, total_up, PARTS)
    if REST > 0:
        if norm is not None:
            other_value, square = _scaled(other_value, other_scale, offset, square, PARTS)
        total = _times(other_weight, other_value, total, PARTS)
        if gated:
            total_up = _times(other_weight_up, other_value, total_up, PARTS)
    if PARTS > 1:
        total, total_up = tl.sum(total, 0), tl.sum(total_up, 0)
    _finish(total, total_up, square, added, y, places, inside_y, inner, eps, norm is not None, ACTIVATION)


@triton.jit(do_not_specialize=["count", "n0", "n1", "n2"])
def _few_rows(
    x, w0, w1, w2, b0, b1, b2, norm, residual, y0, y1, y2, parts, done, count, n0, n1, n2, inner: tl.constexpr,
    eps, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    w, y, size, first, bias = _tile_of(
        tile, w0, w1, w2, b0, b1, b2, y0, y1, y2, n0, n1, n2, ACTIVATION, BLOCK_N
    )  # fmt: skip
    gated: tl.constexpr = ACTIVATION != ""
    steps: tl.constexpr = (inner + BLOCK_K - 1) // BLOCK_K
    share: tl.constexpr = (steps + SPLITS - 1) // SPLITS * BLOCK_K
    rows, tokens, span = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    of_weight = tl.minimum(rows, size - 1)[:, None] * inner + span[None, :]
    of_x = tl.minimum(tokens, count - 1)[:, None] * inner + span[None, :]
    if PDL:
        gdc_launch_dependents()
        starts = tl.minimum(rows, size - 1) * inner + split * share
        per_line: tl.constexpr = 1024 // w.dtype.element_ty.primitive_bitwidth
        _prefetch(w, starts, size * inner, share // per_line, per_line)
        if gated:
            _prefetch(w1, starts, size * inner, share // per_line, per_line)
        gdc_wait()
    places = tokens[None, :] * size + rows[:, None]
    inside_y = (tokens < count)[None, :] & (rows < size)[:, None]
    added = tl.zeros([BLOCK_N, BLOCK_M], tl.float32) + bias[:, None]
    if residual is not None:  # loaded here, where nothing waits for it yet
        added += tl.load(residual + places, mask=inside_y, other=0).to(tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    total_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    square = tl.zeros([BLOCK_M], tl.float32)
    for step in range(share // BLOCK_K):
        k = split * share + step * BLOCK_K
        inside = (k + span < inner)[None, :]
        value = tl.load(x + of_x + k, mask=inside, other=0)
        weight = tl.load(w + of_weight + k, mask=inside, other=0)
        if norm is not None:
            wide = value.to(tl.float32)
            square += tl.sum(wide * wide, 1)
            scale = offset + tl.load(norm + k + span, mask=k + span < inner, other=0).to(tl.float32)
            value = (wide * scale[None, :]).to(value.dtype)
        total = tl.dot(weight, tl.trans(value), total, input_precision="ieee")
        if gated:
            weight_up = tl.load(w1 + of_weight + k, mask=inside, other=0)
            total_up = tl.dot(weight_up, tl.trans(value), total_up, input_precision="ieee")
    if SPLITS == 1:
        _finish(total, total_up, square, added, y, places, inside_y, inner, eps, norm is not None, ACTIVATION)
    else:
        words: tl.constexpr = BLOCK_N * BLOCK_M
        part: tl.constexpr = words * (2 if gated else 1) + BLOCK_M
        of_part = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tokens[None, :]
        mine = parts + (tile * SPLITS + split) * part
        tl.store(mine + of_part, total)
        if gated:
            tl.store(mine + words + of_part, total_up)
        if norm is not None:
            tl.store(mine + part - BLOCK_M + tokens, square)
        tl.debug_barrier()  # the counter must be incremented after the stores of all threads
        if tl.atomic_add(done + tile, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(done + tile, 0)
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            total_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            square = tl.zeros([BLOCK_M], tl.float32)
            for other in range(SPLITS):
                theirs = parts + (tile * SPLITS + other) * part
                total += tl.load(theirs + of_part, cache_modifier=".cg")
                if gated:
                    total_up += tl.load(theirs + words + of_part, cache_modifier=".cg")
                if norm is not None:
                    square += tl.load(theirs + part - BLOCK_M + tokens, cache_modifier=".cg")
            _finish(total, total_up, square, added, y, places, inside_y, inner, eps, norm is not None, ACTIVATION)


@triton.jit
def _finish(
    total, total_up, square, added, y, places, inside, inner, eps, NORM: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """Statistics, activation or bias and residual, and the store of one tile."""
    if NORM:
        factor = tl.rsqrt(square / inner + eps)[None, :]
        total *= factor
        total_up *= factor
    if ACTIVATION != "":
        total = _activate(total, ACTIVATION) * total_up
    else:
        total += added
    tl.store(y + places, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _prefetch(w, starts, end, WANTED: tl.constexpr, PER_LINE: tl.constexpr):
    """Ask for the first lines of 128 bytes from each start on, up to 16."""
    lines: tl.constexpr = 16 if WANTED >= 16 else 8 if WANTED >= 8 else 4 if WANTED >= 4 else 2
    places = tl.minimum(starts[:, None] + tl.arange(0, lines)[None, :] * PER_LINE, end - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [(w + places).to(tl.int64, bitcast=True)], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip
