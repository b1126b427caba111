"""What the kernels of trainable sparse attention share: tilings, and how a program finds its block and its rows.

The rows of a program are the query heads of some tokens: HEADS to a token, a power of two, of which REPEAT are real.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from effpass.lowering.kernels.launch import interpreted, launch_options, overlaps
from effpass.lowering.kernels.routed_index import TILE

__all__ = ["Described", "Sizes", "Tiling", "item_of", "options", "rows_of", "tiling", "tokens_at_once"]

_BYTES = 1 << 30  # of what waits to be merged


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
    """Rows of a program, keys that it reads at once, its warps, and how many tiles are on their way."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    has_descriptors: bool = True


# By the bytes of the widest head, up to: forward, gradient of queries, gradients of keys and values.
_TILINGS = {
    256: {"forward": Tiling(128, 64, 8, 3), "query": Tiling(128, 64, 8, 2), "key": Tiling(64, 128, 8, 3)},
    512: {"forward": Tiling(64, 32, 4, 2), "query": Tiling(64, 32, 8, 2), "key": Tiling(32, 64, 8, 1)},
    1024: {"forward": Tiling(32, 32, 4, 1), "query": Tiling(32, 32, 4, 1), "key": Tiling(32, 32, 8, 1)},
}


def tiling(kernel: str, sizes: Sizes, element_size: int) -> Tiling:
    """The tiling of `kernel`: forward, query or key."""
    widest = max(sizes.BLOCK_K, sizes.BLOCK_V) * element_size
    how = next(found[kernel] for most, found in _TILINGS.items() if widest <= most)
    return how._replace(block_m=max(how.block_m, sizes.HEADS), block_n=min(how.block_n, sizes.BLOCK))


def tokens_at_once(tokens: int, token_bytes: int) -> int:
    """How many tokens' parts wait in memory, a multiple of TILE."""
    return min(triton.cdiv(tokens, TILE), max(1, _BYTES // token_bytes // TILE)) * TILE


def options(device: torch.device, how: Tiling) -> dict[str, Any]:
    return launch_options(device, how.num_warps, how.num_stages) | ({"launch_pdl": False} if overlaps(device) else {})


class Described(NamedTuple):
    """Rows of keys or values [T, G, size] for the tensor memory accelerator.

    Attributes:
        of: the descriptor; None where there is no accelerator, or strides don't fit.
        row: rows between two heads.
        column: columns between two heads.
    """

    of: TensorDescriptor | None
    row: int
    column: int

    @classmethod
    def rows(cls, x: Tensor, rows: int, size: int, wanted: bool) -> Described:
        """`rows` of them at a time, `size` wide."""
        (tokens, groups, width), (of_token, of_group, _) = x.shape, x.stride()
        bytes_of = x.element_size()
        fits = width == size and of_token * bytes_of % 16 == 0 and of_group * bytes_of % 16 == 0
        if not wanted or not fits or not (overlaps(x.device) or interpreted()) or x.data_ptr() % 16:
            return cls(None, 0, 0)
        if groups == 1 or (groups - 1) * of_group + width <= of_token:  # heads side by side
            described, row, column = [tokens, (groups - 1) * of_group + width], 0, of_group
        elif of_group % of_token == 0:  # one head after the other
            row, column = of_group // of_token, 0
            described = [(groups - 1) * row + tokens, width]
        else:
            return cls(None, 0, 0)
        return cls(TensorDescriptor(x, described, [of_token, 1], [rows, size]), row, column)


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
    token = tl.load(listed + at, mask=at < end, other=0)
    return at, token, head, (at < end) & (head < REPEAT)
