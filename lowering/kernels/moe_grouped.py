"""Triton kernels of `effpass::moe_ffn` for any number of tokens: grouped matrix products of rows sorted by expert.

    out[t] = Σ_j weights[t, j] · (W_down h(W_gate_up x[t] + b_gate_up) + b_down)

There are four launches, and the host waits for none of them: sorting the pairs of a token and an expert
(:mod:`effpass.lowering.kernels.moe_route`); the first product, which gathers its rows and applies the gate h; the
second, which scatters its rows to the original order of pairs; the weighted sum. A program computes tiles of up to
`rows` pairs of one expert and `columns` features, which it finds on the device from the offsets of each expert's pairs,
so that one CUDA graph serves every routing.

With few rows per expert, the weights are the tall operand of the tensor cores and tiles have 16 or 32 rows; the kernel
is then bound by reading weights. With many rows per expert, the rows are the tall operand. A product may be divided:
experts whose rows fit into one low tile are computed by one launch, and the others with higher tiles by the next one,
so that neither kind of expert pays for the tiles of the other. Weights and sorted rows are
read by the tensor memory accelerator (TMA) if they are contiguous (weights possibly transposed) and aligned, gathered
rows by ordinary loads. Products accumulate in float32, where biases and gate are applied as well; h and the outputs of
pairs are rounded to the dtype of x.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from effpass.lowering.kernels.launch import launch_options, multiprocessors, overlaps, shared_memory
from effpass.lowering.kernels.moe_gate import gate
from effpass.lowering.kernels.moe_route import combine, route

__all__ = ["TILES", "Tile", "Tiles", "fits", "moe_ffn", "products"]


@dataclass(frozen=True)
class Tile:
    """Tile size and launch configuration of one grouped product.

    Attributes:
        rows: rows per tile.
        columns: columns per tile; in the first product, columns of gate and of up each.
        depth: elements per step along the inner dimension, for 16-bit dtypes.
        warps: warps per program.
        stages: steps whose loads are in flight at once.
        resident: programs per multiprocessor that process many tiles each; 0 for one program per tile.
        tall_weights: whether the weights are the tall operand of the tensor cores.
        tma: whether to use the tensor memory accelerator if possible.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    resident: int = 0
    tall_weights: bool = False
    tma: bool = True


#: Pairs of tiles, each for the first and the second product, by growing height. An expert takes the first pair whose
#: height its rows don't exceed, or the last pair.
Tiles = tuple[tuple[Tile, Tile], ...]

_OF_16 = (Tile(16, 64, 128, 4, 3, tall_weights=True), Tile(16, 128, 128, 4, 3, tall_weights=True))
_OF_32 = (Tile(32, 64, 128, 4, 4, tall_weights=True), Tile(32, 128, 128, 4, 4, tall_weights=True))
_OF_64 = (Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4))
_OF_64_DEEP = (Tile(64, 64, 128, 8, 4), Tile(64, 128, 128, 8, 4))
_OF_128 = (Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4))

#: Tiles by name of :data:`~effpass.lowering.ops.moe_ffn_cost.KERNELS`.
TILES: dict[str, Tiles] = {
    "grouped16": (_OF_16,),
    "grouped32": (_OF_32,),
    "grouped64": (_OF_64,),
    "grouped128": (_OF_128,),
    "mixed64": (_OF_32, _OF_64_DEEP),
    "mixed128": (_OF_64, _OF_128),
}
_LEAST_STAGES = 2  # that overlap loads with products


def fits(tiles: Tiles, device: torch.device) -> bool:
    """Return whether the shared memory of a multiprocessor holds enough loads in flight to overlap them."""
    return all(
        _stages(*sized, device) >= _LEAST_STAGES for pair in tiles for sized in zip(pair, (True, False), strict=True)
    )


def _stages(tile: Tile, gated: bool, device: torch.device) -> int:
    """Return the stages of a tile of the first (`gated`) or second product that fit into shared memory."""
    if device.type != "cuda":
        return tile.stages
    # A step has the same number of bytes along the inner dimension for every dtype.
    step = 2 * tile.depth * (tile.rows + tile.columns * (2 if gated else 1))
    return min(tile.stages, shared_memory(device) // step)


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
    tiles: Tiles,
) -> Tensor:
    """Run `effpass::moe_ffn` without returning the projection.

    All tensors except `gate_up` and `down` must be contiguous; of these, one of the last two strides must be 1.
    """
    each, (count, width, _) = experts.shape[1], down.shape
    order, starts = route(experts, count)
    outputs = x.new_empty(experts.numel(), width)
    gate = (activation, alpha, limit, offset, interleaved)
    products(
        x, None, each, order, starts, experts.numel(), tiles, outputs, gate_up, gate_up_bias, down, down_bias, *gate
    )
    return combine(outputs, experts, weights, count, x.new_empty(x.shape))


def products(
    x: Tensor,
    reads: Tensor | None,
    each: int,
    order: Tensor,
    starts: Tensor,
    pairs: int,
    tiles: Tiles,
    outputs: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    offset: float,
    interleaved: bool,
) -> None:
    """Compute the outputs of pairs, not yet multiplied by router weights.

    Arguments not listed are those of :func:`moe_ffn`.

    Args:
        x: [R, D].
        reads: int32, of which pair p uses `reads[p · each]` as its row of `x`; None for row p // each.
        each: stride of `reads`, or number of experts per token.
        order: int32 [P], pairs sorted by expert.
        starts: int32 [E + 1], offsets of each expert's pairs in `order`, for the experts of `gate_up` and `down`.
        pairs: maximum number of pairs of these experts.
        outputs: [P, D]; row p is written for each pair p of these experts.
    """
    width, inner = down.shape[1:]
    hidden = x.new_empty(order.shape[0], inner)
    of_gate = {"alpha": alpha, "limit": limit, "offset": offset, "ACTIVATION": activation, "LIMITED": limit != 0,
               "INTERLEAVED": interleaved}  # fmt: skip
    of_none = {"alpha": 0.0, "limit": 0.0, "offset": 0.0, "ACTIVATION": "", "LIMITED": False, "INTERLEAVED": False}
    of_pairs = (order, starts, pairs, reads, each)
    heights = [first.rows for first, _ in tiles]
    classes = list(zip([0, *heights[:-1]], [*heights[:-1], pairs], strict=True))
    for (first, _), rows_of in zip(tiles, classes, strict=True):
        _launch(x, gate_up, gate_up_bias, hidden, *of_pairs, *rows_of, inner, first, of_gate)
    for (_, second), rows_of in zip(tiles, classes, strict=True):
        _launch(hidden, down, down_bias, outputs, *of_pairs, *rows_of, width, second, of_none)


def _launch(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    order: Tensor,
    starts: Tensor,
    pairs: int,
    reads: Tensor | None,
    each: int,
    above: int,
    most: int,
    columns: int,
    tile: Tile,
    of_gate: dict[str, Any],
) -> None:
    """Launch one grouped product: of gathered rows, followed by the gate, or of rows that are already sorted.

    Experts take part that have more than `above` and at most `most` rows.
    """
    if rows.element_size() == 4:
        tile = _without_tensor_cores(tile)
    count, depth = weight.shape[0], weight.shape[2]
    across = triton.cdiv(columns, tile.columns)
    # At most one tile per expert is not full.
    full = pairs // tile.rows if most > tile.rows else 0
    programs = (min(pairs // (above + 1), count) + full) * across
    if programs == 0:
        return
    if tile.resident:
        programs = min(programs, tile.resident * multiprocessors(rows.device))
    block_k = min(tile.depth * 2 // rows.element_size(), max(16, triton.next_power_of_2(depth)))
    gated = of_gate["ACTIVATION"] != ""
    wide = tile.columns * (2 if of_gate["INTERLEAVED"] else 1)
    transposed = weight.stride(2) != 1
    tiles = of_rows = None
    if tile.tma and _reachable(weight):
        stored, block = (weight.mT, [1, block_k, wide]) if transposed else (weight, [1, wide, block_k])
        tiles = TensorDescriptor.from_tensor(stored, block)
    if tile.tma and not gated and _reachable(rows):
        of_rows = TensorDescriptor.from_tensor(rows, [tile.rows, block_k])
    _grouped[(programs,)](
        rows, weight, tiles, of_rows, bias, out, order, starts, reads, *weight.stride(), each, above, most, **of_gate,
        COUNT=count, SLOTS=triton.next_power_of_2(count), DEPTH=depth, COLUMNS=columns, BLOCK_M=tile.rows,
        BLOCK_N=tile.columns, BLOCK_K=block_k, TALL_WEIGHTS=tile.tall_weights, TRANSPOSED=transposed,
        FOLLOWS=above > 0, PDL=overlaps(rows.device),
        **launch_options(rows.device, tile.warps, _stages(tile, gated, rows.device)),
    )  # fmt: skip


def _without_tensor_cores(tile: Tile) -> Tile:
    """Return a smaller tile for float32, whose products run on ordinary cores and take more registers."""
    return replace(tile, rows=min(tile.rows, 64), columns=32, depth=64, stages=2, tall_weights=False)


def _reachable(tensor: Tensor) -> bool:
    """Return whether the tensor memory accelerator exists and can read `tensor`: contiguous, rows 16-byte aligned."""
    if tensor.is_cuda and not overlaps(tensor.device):  # it requires compute capability 9.0, as dependent launch does
        return False
    stored = tensor if tensor.stride(-1) == 1 else tensor.mT
    row = stored.shape[-1] * stored.element_size()
    return stored.is_contiguous() and row % 16 == 0 and stored.data_ptr() % 16 == 0


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["each", "above", "most"], do_not_specialize_on_alignment=["starts"])
def _grouped(
    rows, weight, weight_tiles, row_tiles, bias, out, order, starts, reads, stride_e, stride_n, stride_k, each, above,
    most, alpha, limit, offset, ACTIVATION: tl.constexpr, LIMITED: tl.constexpr, INTERLEAVED: tl.constexpr,
    COUNT: tl.constexpr, SLOTS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TALL_WEIGHTS: tl.constexpr, TRANSPOSED: tl.constexpr,
    FOLLOWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    gated: tl.constexpr = ACTIVATION != ""
    across: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    wide: tl.constexpr = 2 * BLOCK_N if INTERLEAVED else BLOCK_N
    every: tl.constexpr = 2 * COLUMNS if gated else COLUMNS  # rows of the weight of one expert
    even: tl.constexpr = DEPTH % BLOCK_K == 0
    # What all programs of the preceding kernel have waited for is there when a program of this one starts. If this is
    # the next part of a product, it needs no more, and only has to end after the preceding part.
    if PDL:
        if not FOLLOWS:
            gdc_wait()
        gdc_launch_dependents()
    slot, m, k = tl.arange(0, SLOTS), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    begin = tl.load(starts + slot, mask=slot < COUNT, other=0)
    end = tl.load(starts + slot + 1, mask=slot < COUNT, other=0)
    held = end - begin
    held = tl.where((held > above) & (held <= most), held, 0)
    upto = tl.cumsum((held + BLOCK_M - 1) // BLOCK_M, 0) * across
    for tile in range(tl.program_id(0), tl.max(upto, 0), tl.num_programs(0)):
        done = upto <= tile
        expert = tl.sum(done.to(tl.int32), 0)
        local = tile - tl.max(tl.where(done, upto, 0), 0)
        first, last = tl.load(starts + expert), tl.load(starts + expert + 1)
        down = (last - first + BLOCK_M - 1) // BLOCK_M
        row, column = first + local % down * BLOCK_M, local // down * BLOCK_N  # adjacent tiles share weights
        place = tl.minimum(row + m, last - 1)
        pair = tl.load(order + place)
        source = place
        if gated:
            source = pair // each if reads is None else tl.load(reads + pair * each)
        of_row = rows + source.to(tl.int64)[:, None] * DEPTH + k[None, :]
        n = column * (2 if INTERLEAVED else 1) + tl.arange(0, wide)
        limit_n: tl.constexpr = every if INTERLEAVED or not gated else COLUMNS
        of_n = weight + expert.to(tl.int64) * stride_e + tl.minimum(n, limit_n - 1)[:, None] * stride_n
        of_weight = of_n + k[None, :] * stride_k
        first_n = column * (2 if INTERLEAVED else 1)
        total = tl.zeros([wide, BLOCK_M] if TALL_WEIGHTS else [BLOCK_M, wide], tl.float32)
        total_up = tl.zeros([wide, BLOCK_M] if TALL_WEIGHTS else [BLOCK_M, wide], tl.float32)
        for at in range(0, DEPTH, BLOCK_K):
            inside = (at + k < DEPTH)[None, :]
            if row_tiles is not None:
                value = row_tiles.load([row, at])
            else:
                value = tl.load(of_row + at) if even else tl.load(of_row + at, mask=inside, other=0)
            if weight_tiles is not None:
                w = _tile(weight_tiles, expert, first_n, at, wide, BLOCK_K, TRANSPOSED)
            else:
                w = (
                    tl.load(of_weight + at * stride_k)
                    if even
                    else tl.load(of_weight + at * stride_k, mask=inside, other=0)
                )
            total = _dot(w, value, total, TALL_WEIGHTS)
            if gated and not INTERLEAVED:
                if weight_tiles is not None:
                    w_up = _tile(weight_tiles, expert, first_n + COLUMNS, at, wide, BLOCK_K, TRANSPOSED)
                else:
                    of_up = of_weight + COLUMNS * stride_n + at * stride_k
                    w_up = tl.load(of_up) if even else tl.load(of_up, mask=inside, other=0)
                total_up = _dot(w_up, value, total_up, TALL_WEIGHTS)
        if TALL_WEIGHTS:
            total, total_up = tl.trans(total), tl.trans(total_up)
        if INTERLEAVED:
            total, total_up = tl.split(total.reshape(BLOCK_M, BLOCK_N, 2))
        feature = column + tl.arange(0, BLOCK_N)
        live = (row + m < last)[:, None] & (feature < COLUMNS)[None, :]
        if bias is not None:
            of_bias = bias + expert.to(tl.int64) * every + tl.minimum(feature, COLUMNS - 1) * (2 if INTERLEAVED else 1)
            total += tl.load(of_bias).to(tl.float32)[None, :]
            if gated:
                total_up += tl.load(of_bias + (1 if INTERLEAVED else COLUMNS)).to(tl.float32)[None, :]
        if gated:
            total = gate(total, total_up, alpha, limit, offset, ACTIVATION, LIMITED)
        to = (place if gated else pair).to(tl.int64)[:, None] * COLUMNS + feature[None, :]
        tl.store(out + to, total.to(out.dtype.element_ty), mask=live)
    if PDL and FOLLOWS:
        gdc_wait()


@triton.jit
def _tile(tiles, expert, n, k, WIDE: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[WIDE, BLOCK_K] of one expert's weight; zeros beyond its end."""
    if TRANSPOSED:
        return tl.trans(tiles.load([expert, k, n]).reshape(BLOCK_K, WIDE))
    else:
        return tiles.load([expert, n, k]).reshape(WIDE, BLOCK_K)


@triton.jit
def _dot(weight, rows, total, TALL_WEIGHTS: tl.constexpr):
    if TALL_WEIGHTS:
        return tl.dot(weight, tl.trans(rows), total, input_precision="ieee")
    else:
        return tl.dot(rows, tl.trans(weight), total, input_precision="ieee")
