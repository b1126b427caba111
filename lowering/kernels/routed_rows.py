"""What the Triton kernels of trainable sparse attention share: tilings, and access to the rows and keys of a program.

The kernels are those of :mod:`effpass.lowering.kernels.routed_attention` and
:mod:`effpass.lowering.kernels.routed_gradient`. The rows of a program are the query heads of some tokens. Each token
has HEADS rows, a power of two, of which the first REPEAT = H / G are used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effpass.lowering.kernels.launch import launch_options, multiprocessors, overlaps, shared_memory
from effpass.lowering.kernels.routed_index import TILE

__all__ = [
    "Sizes",
    "Tiling",
    "item_of",
    "keys_at",
    "options",
    "parts_at",
    "piece_size",
    "rows_of",
    "tiling",
    "tokens_at_once",
]

_BYTES = 1 << 30  # maximum bytes of partial results that wait to be merged
_PIECES = 8  # pieces of lists per multiprocessor


class Sizes(NamedTuple):
    """Compile-time constants of the kernels of one call.

    Attributes:
        REPEAT: query heads per KV head.
        HEADS: `REPEAT` rounded up to a power of two.
        KEY: key size K.
        VALUE: value size V.
        BLOCK: keys per block.
        BLOCK_K: `KEY` rounded up to a power of two, at least 16.
        BLOCK_V: `VALUE` rounded up to a power of two, at least 16.
    """

    REPEAT: int
    HEADS: int
    KEY: int
    VALUE: int
    BLOCK: int
    BLOCK_K: int
    BLOCK_V: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, block: int) -> Sizes:
        repeat, power = q.shape[1] // k.shape[1], triton.next_power_of_2
        return cls(repeat, power(repeat), q.shape[2], v.shape[2], block, max(16, power(q.shape[2])),
                   max(16, power(v.shape[2])))  # fmt: skip


class Tiling(NamedTuple):
    """Tile sizes and launch configuration of a kernel.

    Attributes:
        block_m: rows per step.
        block_n: keys per matrix product.
        num_warps: warps per program.
        num_stages: steps whose loads are in flight.
        products: matrix products per step; a program keeps the keys of all of them.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    products: int = 1

    def splits(self, block: int) -> int:
        """Return the number of programs that share the keys of one block."""
        return block // (self.block_n * self.products)


# Tilings of forward pass, gradient of queries, and gradients of keys and values, by maximum bytes of a head.
_TILINGS = {
    256: {"forward": Tiling(128, 64, 8, 2, 4), "query": Tiling(64, 64, 4, 2, 4), "key": Tiling(64, 128, 8, 3)},
    512: {"forward": Tiling(64, 64, 8, 2, 2), "query": Tiling(64, 32, 4, 1, 4), "key": Tiling(32, 64, 8, 1)},
    1024: {"forward": Tiling(32, 32, 4, 1), "query": Tiling(32, 32, 4, 1), "key": Tiling(32, 32, 8, 1)},
}
_ROOM = 227 * 1024  # maximum bytes of shared memory that these tilings take
# Tilings for devices with less shared memory, down to 99 KiB.
_SMALL = {
    256: {"forward": Tiling(64, 64, 4, 2), "query": Tiling(64, 32, 4, 1, 2), "key": Tiling(32, 64, 4, 2)},
    512: {"forward": Tiling(32, 32, 4, 1), "query": Tiling(32, 32, 4, 1), "key": Tiling(32, 32, 4, 1)},
    1024: {"forward": Tiling(16, 16, 4, 1), "query": Tiling(16, 16, 4, 1), "key": Tiling(16, 16, 4, 1)},
}


def tiling(kernel: str, sizes: Sizes, element_size: int, device: torch.device) -> Tiling:
    """Return the tiling of `kernel`, which is ``"forward"``, ``"query"`` or ``"key"``."""
    widest = max(sizes.BLOCK_K, sizes.BLOCK_V) * element_size
    tilings = _TILINGS if shared_memory(device) >= _ROOM else _SMALL
    how = next(found[kernel] for most, found in tilings.items() if widest <= most)
    block_n = min(how.block_n, sizes.BLOCK)
    return how._replace(
        block_m=max(how.block_m, sizes.HEADS), block_n=block_n, products=min(how.products, sizes.BLOCK // block_n)
    )


def piece_size(tokens: int, places: int, groups: int, step: int, device: torch.device) -> int:
    """Return the tokens per piece of a list, a multiple of `step`, for several pieces per multiprocessor."""
    return triton.cdiv(triton.cdiv(tokens * places * groups, _PIECES * multiprocessors(device)), step) * step


def tokens_at_once(tokens: int, token_bytes: int) -> int:
    """Return for how many tokens partial results are stored at once, a multiple of TILE."""
    return min(triton.cdiv(tokens, TILE), max(1, _BYTES // token_bytes // TILE)) * TILE


def options(device: torch.device, how: Tiling) -> dict[str, Any]:
    return launch_options(device, how.num_warps, how.num_stages) | ({"launch_pdl": False} if overlaps(device) else {})


# -- in kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def item_of(blocks, firsts, ends, item, items, part, group, groups):
    """The block of an item, and the places in its group's list from which and up to which it goes."""
    at = (part * groups + group).to(tl.int64) * items + item
    return tl.load(blocks + at), tl.load(firsts + at), tl.load(ends + at)


@triton.jit
def rows_of(listed, first, end, REPEAT: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Place in the list, token, query head of its group, and whether there is such a row."""
    row = tl.arange(0, BLOCK_M)
    at, head = first + row // HEADS, row % HEADS
    return at, tl.load(listed + at, mask=at < end, other=0), head, (at < end) & (head < REPEAT)


@triton.jit
def keys_at(x, first, stop, stride, SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """[BLOCK_N, BLOCK_SIZE] of rows of keys or values from `first` on; zeros from `stop` on."""
    row, d = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_SIZE)
    at = x + row.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(at, mask=(row < stop)[:, None] & (d < SIZE)[None, :], other=0)


@triton.jit
def parts_at(
    x, first, stop, stride, SIZE: tl.constexpr, PRODUCTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """PRODUCTS times :func:`keys_at`, one behind the other."""
    found = (keys_at(x, first, stop, stride, SIZE, BLOCK_N, BLOCK_SIZE),)
    for i in tl.static_range(1, PRODUCTS):
        more = keys_at(x, first + i * BLOCK_N, stop, stride, SIZE, BLOCK_N, BLOCK_SIZE)
        found = found + (more,)  # type: ignore[assignment]  # noqa: RUF005  (Triton has no unpacking)
    return found
