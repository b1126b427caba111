"""What the kernels of trainable sparse attention share: tilings, and how a program finds its block and its rows.

The rows of a program are the query heads of some tokens: HEADS to a token, a power of two, of which REPEAT are real.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effpass.lowering.kernels.launch import launch_options, multiprocessors, overlaps
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

_BYTES = 1 << 30  # of what waits to be merged
_PIECES = 8  # of lists, for each multiprocessor


class Sizes(NamedTuple):
    """Constants of the kernels of one call."""

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
    """Rows of a step, keys of a product, warps, steps that are on their way, and products of a step.

    A program keeps the keys of its products, and a block of keys has as many programs as it takes.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    products: int = 1

    def splits(self, block: int) -> int:
        """Programs of one block of keys."""
        return block // (self.block_n * self.products)


# By the bytes of the widest head, up to: forward, gradient of queries, gradients of keys and values.
_TILINGS = {
    256: {"forward": Tiling(128, 64, 8, 2, 4), "query": Tiling(64, 64, 4, 2, 4), "key": Tiling(64, 128, 8, 3)},
    512: {"forward": Tiling(64, 64, 8, 2, 2), "query": Tiling(64, 32, 4, 1, 4), "key": Tiling(32, 64, 8, 1)},
    1024: {"forward": Tiling(32, 32, 4, 1), "query": Tiling(32, 32, 4, 1), "key": Tiling(32, 32, 8, 1)},
}
_ROOM = 227 * 1024  # bytes of shared memory that these take at the most
# For devices that have less, down to 99 KiB.
_SMALL = {
    256: {"forward": Tiling(64, 64, 4, 2), "query": Tiling(64, 32, 4, 1, 2), "key": Tiling(32, 64, 4, 2)},
    512: {"forward": Tiling(32, 32, 4, 1), "query": Tiling(32, 32, 4, 1), "key": Tiling(32, 32, 4, 1)},
    1024: {"forward": Tiling(16, 16, 4, 1), "query": Tiling(16, 16, 4, 1), "key": Tiling(16, 16, 4, 1)},
}


def tiling(kernel: str, sizes: Sizes, element_size: int, device: torch.device) -> Tiling:
    """The tiling of `kernel`: forward, query or key."""
    widest = max(sizes.BLOCK_K, sizes.BLOCK_V) * element_size
    tilings = _TILINGS if shared_memory(device) >= _ROOM else _SMALL
    how = next(found[kernel] for most, found in tilings.items() if widest <= most)
    block_n = min(how.block_n, sizes.BLOCK)
    return how._replace(
        block_m=max(how.block_m, sizes.HEADS), block_n=block_n, products=min(how.products, sizes.BLOCK // block_n)
    )


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have."""
    if device.type != "cuda":
        return _ROOM
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def piece_size(tokens: int, places: int, groups: int, step: int, device: torch.device) -> int:
    """Tokens of a piece of a list, a multiple of `step`: some pieces for each multiprocessor."""
    return triton.cdiv(triton.cdiv(tokens * places * groups, _PIECES * multiprocessors(device)), step) * step


def tokens_at_once(tokens: int, token_bytes: int) -> int:
    """How many tokens' parts wait in memory, a multiple of TILE."""
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
