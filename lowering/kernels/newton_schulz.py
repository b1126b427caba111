"""Triton kernel of :mod:`effpass.lowering.ops.symmetric_product` for Hopper GPUs.

    C_i = α · A_i B_iᵀ + β · D_i + γ · I      A, B [B, M, K];  C, D [B, M, M] symmetric

Only the tiles on and above the diagonal are computed; the others are their mirror images. Tiles are read by the tensor
memory accelerator, the product runs on wgmma with accumulation in float32, and the epilogue adds β·D and γ·I, rounds,
and writes a tile above the diagonal twice, the second time transposed. By default, tiles are twice as wide as high,
because square tiles of 128 need more bandwidth of the L2 cache than there is. The kernel is persistent: each
multiprocessor runs one program over many tiles, which computes the next tile while the stores of the last one are in
flight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["TILING", "TILINGS", "Tiling", "launch"]


@dataclass(frozen=True)
class Tiling:
    """Tile size and launch configuration.

    Attributes:
        height: rows per tile.
        width: columns per tile, a multiple of `height`.
        depth: elements per step along K.
        warps: warps per program.
        stages: stages of the software pipeline of loads.
        parts: number of parts, 2 or 4, in which a tile is written.
        flat: whether the loops over tiles and over steps are flattened into one, so that the first loads of a tile, and
            those of D, are in flight while the tile before it is written.
        programs: programs per multiprocessor.
    """

    height: int = 128
    width: int = 256
    depth: int = 64
    warps: int = 8
    stages: int = 3
    parts: int = 4
    flat: bool = False
    programs: int = 1


# All fit into the shared memory and the registers of a Hopper multiprocessor without spills.
TILINGS = {
    "wide": Tiling(),
    "wide, 4 stages": Tiling(stages=4),
    "wide, halves": Tiling(parts=2),
    "wide, halves, 4 stages": Tiling(parts=2, stages=4),
    "wide, deep": Tiling(depth=128, stages=2),
    "flat": Tiling(flat=True),
    "flat, halves": Tiling(flat=True, parts=2),
    "flat, shallow": Tiling(flat=True, depth=32, stages=6),
    "square, two programs": Tiling(width=128, warps=4, programs=2),
    "square, flat": Tiling(width=128, warps=4, stages=4, flat=True),
}
TILING = TILINGS["wide"]


def launch(
    a: Tensor,
    b: Tensor,
    d: Tensor | None,
    alpha: float,
    beta: float,
    gamma: float,
    tall: bool,
    dtype: torch.dtype,
    tiling: Tiling = TILING,
) -> Tensor:
    """Return C_i = α · A_i B_iᵀ + β · D_i + γ · I, with arguments as `symmetric_product`, on one device."""
    a, b = a.contiguous(), b.contiguous()
    batch = a.shape[0]
    m, k = (a.shape[2], a.shape[1]) if tall else (a.shape[1], a.shape[2])
    c = torch.empty((batch, m, m), dtype=dtype, device=a.device)
    if c.numel() == 0:
        return c
    height, width, depth = tiling.height, tiling.width, tiling.depth
    use_d = d is not None and beta != 0.0
    left = [1, depth, height] if tall else [1, height, depth]
    right = [1, depth, width] if tall else [1, width, depth]
    tile = [1, height, width // tiling.parts]
    c_tiles = TensorDescriptor.from_tensor(c, tile)
    columns, rows = triton.cdiv(m, width), triton.cdiv(m, height)
    ratio = width // height
    # Rows of tiles come in groups of `ratio`; only the last group, which starts in the last column, may be smaller.
    tiles = ratio * (columns * (columns + 1) // 2 - 1) + rows - ratio * (columns - 1)
    processors = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 1
    programs = processors * tiling.programs
    _symmetric[(min(programs, tiles * batch),)](
        TensorDescriptor.from_tensor(a, left),
        TensorDescriptor.from_tensor(b, right),
        TensorDescriptor.from_tensor(d.contiguous(), tile) if use_d and d is not None else c_tiles,
        c_tiles,
        TensorDescriptor.from_tensor(c, [1, width // tiling.parts, height]),
        tiles,
        tiles * batch,
        columns,
        k,
        float(alpha),
        float(beta),
        float(gamma),
        TALL=tall,
        USE_D=use_d,
        USE_I=gamma != 0.0,
        HEIGHT=height,
        WIDTH=width,
        DEPTH=depth,
        PARTS=tiling.parts,
        FLAT=tiling.flat,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return c


@triton.jit
def _symmetric(
    a_tiles,
    b_tiles,
    d_tiles,
    c_tiles,
    mirrored_tiles,
    tiles,
    total_tiles,
    columns,
    k,
    alpha,
    beta,
    gamma,
    TALL: tl.constexpr,
    USE_D: tl.constexpr,
    USE_I: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    FLAT: tl.constexpr,
):
    RATIO: tl.constexpr = WIDTH // HEIGHT
    for work in tl.range(tl.program_id(0), total_tiles, tl.num_programs(0), flatten=FLAT):
        matrix = work // tiles
        number = work % tiles
        # Group s of RATIO rows of tiles has columns − s tiles per row and starts at RATIO · (s·columns − s(s−1)/2). The
        # square root may be off by one, which the two lines after it correct.
        n = number // RATIO
        root = tl.sqrt(((2 * columns + 1) * (2 * columns + 1) - 8 * n).to(tl.float32))
        s = ((2 * columns + 1 - root) / 2).to(tl.int32)
        s = tl.where(s * columns - s * (s - 1) // 2 > n, s - 1, s)
        s = tl.where((s + 1) * columns - (s + 1) * s // 2 <= n, s + 1, s)
        rest = number - RATIO * (s * columns - s * (s - 1) // 2)
        row = (s * RATIO + rest // (columns - s)) * HEIGHT
        column = (s + rest % (columns - s)) * WIDTH

        total = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
        for start in range(0, k, DEPTH):
            if TALL:
                left = tl.trans(a_tiles.load([matrix, start, row]).reshape(DEPTH, HEIGHT))
                right = b_tiles.load([matrix, start, column]).reshape(DEPTH, WIDTH)
            else:
                left = a_tiles.load([matrix, row, start]).reshape(HEIGHT, DEPTH)
                right = tl.trans(b_tiles.load([matrix, column, start]).reshape(WIDTH, DEPTH))
            total = tl.dot(left, right, total)
        # Tiles that touch the diagonal are computed in full by the rows of their group and need no mirror image: it is
        # stored past the end of the matrix, where stores are dropped. (An `if` here would end the overlap of stores.)
        mirror = tl.where(column >= (s + 1) * WIDTH, column, columns * WIDTH)
        # Stored in parts, so that stores take little of the shared memory that loads need.
        PART: tl.constexpr = WIDTH // PARTS
        left_half, right_half = _halves(total)
        for side in tl.static_range(2):
            half = left_half if side == 0 else right_half
            at, to = column + side * WIDTH // 2, mirror + side * WIDTH // 2
            if PARTS == 2:
                _finish(
                    half, matrix, row, at, to, d_tiles, c_tiles, mirrored_tiles, alpha, beta, gamma, USE_D, USE_I,
                    HEIGHT, PART,
                )  # fmt: skip
            else:
                first, second = _halves(half)
                _finish(
                    first, matrix, row, at, to, d_tiles, c_tiles, mirrored_tiles, alpha, beta, gamma, USE_D, USE_I,
                    HEIGHT, PART,
                )  # fmt: skip
                _finish(
                    second, matrix, row, at + PART, to + PART, d_tiles, c_tiles, mirrored_tiles, alpha, beta, gamma,
                    USE_D, USE_I, HEIGHT, PART,
                )  # fmt: skip


@triton.jit
def _halves(tile):
    return tl.split(tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def _finish(
    total,
    matrix,
    row,
    column,
    mirror,
    d_tiles,
    c_tiles,
    mirrored_tiles,
    alpha,
    beta,
    gamma,
    USE_D: tl.constexpr,
    USE_I: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    total *= alpha
    if USE_D:
        total += beta * d_tiles.load([matrix, row, column]).reshape(HEIGHT, WIDTH).to(tl.float32)
    if USE_I:
        i = row + tl.arange(0, HEIGHT)
        j = column + tl.arange(0, WIDTH)
        total += tl.where(i[:, None] == j[None, :], gamma, 0.0)
    out = total.to(c_tiles.dtype)
    c_tiles.store([matrix, row, column], out.reshape(1, HEIGHT, WIDTH))
    mirrored_tiles.store([matrix, mirror, row], tl.trans(out).reshape(1, WIDTH, HEIGHT))
