"""Block pool of an offloaded KV cache: all keys and values in host memory, copies of some blocks on the device.

A block is a run of `block` consecutive cache slots of one KV head; a page holds the copy of one block on the device:

    host   [B, G, N, block, W]   keys and values of every token, side by side; or latents (MLA), which serve as both
    pages  [B G C, block, W]     copies of blocks on the device, C pages per head

A decode step writes its token to the host and, if the token's block has a page, to the page as well. It reads each
chosen key from the page of its block, or over the bus from the host if the block has no page
(:mod:`effpass.lowering.ops.two_level_attention`). Where a block lies thus affects time but not results, and an evicted
page needs no write-back. After attention, blocks without a page that the step read are copied to pages for later steps,
because choices change little from one step to the next:

    read    = blocks of the chosen keys
    wanted  = read ∪ {block of the next token}
    copied  = wanted blocks without a page, up to a bound; the next token's block always
    evicted = the least recently wanted pages (LRU), as many as are copied; the lowest index first among equals

Attention does not wait for these copies: on a GPU they run on a side stream and must be complete at the end of the step
(:func:`join`). :mod:`effpass.runtime.kv_offload` builds its caches on this module.

Shapes: B batch, G KV heads, N blocks, C pages per head, K key size, V value size,
M capacity of the list of copies, W = K + V (W = K for latents).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.core.errors import EffpassError
from effpass.lowering.ops.kernel_choice import triton_kernels
from effpass.lowering.ops.two_level_attention import listed
from effpass.lowering.ops.two_level_attention_index import parted

__all__ = ["COUNTED", "BlockPool", "fetch_blocks", "join", "page_write", "side_stream", "write_token"]

#: Columns of :attr:`BlockPool.counts`, each a sum over steps: blocks with a chosen key, those of them without a page,
#: chosen keys, those of them read over the bus, and copied blocks.
COUNTED = ("blocks", "missing_blocks", "tokens", "missing_tokens", "copied")


@dataclass(frozen=True)
class BlockPool:
    """Block pool of one layer, in tensors whose addresses do not change.

    Attributes:
        host: `[B, G, N, block, W]`, all blocks, in host memory that the device can access.
        pages: `[B G C, block, W]`; head h = b G + g owns pages h C to (h + 1) C - 1.
        block_table: int32 `[B, G, N]`, page of each block; -1 for a block without a page.
        owner: int32 `[B, G, C]`, block in each page; -1 for a free page.
        age: int32 `[B, G, C]`, value of `clock` when the page was last wanted; -1 for a free page.
        clock: int32 `[B, G]`, number of steps so far.
        moves: int32 `[B, G, M, 2]`, block and page of each copy that the last step requested.
        moved: int32 `[B, G]`, number of entries of `moves` in use.
        counts: int64 `[B, G, 5]`, statistics; see :data:`COUNTED`.
    """

    host: Tensor
    pages: Tensor
    block_table: Tensor
    owner: Tensor
    age: Tensor
    clock: Tensor
    moves: Tensor
    moved: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, host: Tensor, slots: int, most: int, copies: int) -> BlockPool:
        """Create an empty pool on the device through which `host` is accessed.

        Args:
            host: `[B, G, N, block, W]`.
            slots: number of pages C per head; capped at N.
            most: maximum number of blocks that a step chooses per head.
            copies: maximum number of blocks per head that a step copies in addition to the next token's.

        Raises:
            EffpassError: if there are fewer pages than a step needs.
        """
        batch, groups, blocks, block, width = host.shape
        slots, wanted = min(slots, blocks), min(most + 1, blocks)
        if slots < wanted:
            raise EffpassError(
                f"a pool of {slots} blocks, and a step wants {wanted}: those that it chooses, and the next token's",
                hint=f"give the pool {wanted} blocks or more, or let a step choose fewer",
            )

        def full(*shape: int, value: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full((batch, groups, *shape), value, dtype=dtype, device=host.device)

        # Initialized with zeros: a masked slot has weight 0, and 0 times uninitialized memory may be NaN.
        pages = torch.zeros(batch * groups * slots, block, width, dtype=host.dtype, device=host.device)
        return cls(
            host, pages, full(blocks, value=-1), full(slots, value=-1), full(slots, value=-1), full(),
            full(min(copies, most) + 1, 2), full(), full(len(COUNTED), dtype=torch.int64),
        )  # fmt: skip

    def rows(self, count: int) -> BlockPool:
        """Return the pool of the first `count` sequences, as views."""
        if count == self.host.shape[0]:
            return self
        names = ("host", "block_table", "owner", "age", "clock", "moves", "moved", "counts")
        pages = self.pages[: count * self.owner.shape[1] * self.owner.shape[2]]
        return replace(self, pages=pages, **{name: getattr(self, name)[:count] for name in names})

    def cached(self, key_size: int, value_size: int) -> tuple[Tensor, Tensor]:
        """Return views of the pages: keys `[B G C, block, K]` and values `[B G C, block, V]`."""
        return parted(self.pages, key_size, value_size)

    def write(self, key: Tensor, value: Tensor, start: Tensor) -> None:
        """Call :func:`page_write` on the pool of the first `key.shape[0]` sequences."""
        pool = self.rows(key.shape[0])
        torch.ops.effpass.page_write(key, value, start, pool.host, pool.pages, pool.block_table)

    def fetch(self, chosen: Tensor, filled: Tensor, entry: int) -> None:
        """Call :func:`fetch_blocks` on the pool of the first `chosen.shape[0]` sequences."""
        pool = self.rows(chosen.shape[0])
        torch.ops.effpass.fetch_blocks(
            chosen, filled, pool.host, pool.pages, pool.block_table, pool.owner, pool.age, pool.clock, pool.moves,
            pool.moved, pool.counts, entry,
        )  # fmt: skip

    def forget(self, first: int = 0) -> None:
        """Free the pages of all blocks from `first` on, whose host memory is written without updating pages."""
        self.block_table[:, :, first:] = -1
        gone = self.owner >= first
        self.owner.masked_fill_(gone, -1)
        self.age.masked_fill_(gone, -1)


# -- side stream ------------------------------------------------------------------------------------------------------


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on `device` for copies that computation does not wait for."""
    return torch.cuda.Stream(device)


def join(times: Tensor) -> None:
    """Make the current stream wait for the copies that its step requested. Also works during CUDA graph capture.

    Args:
        times: int64 `[3]` on the GPU, initially zeros; written. The last entry is the total waiting time in nanoseconds
            of the device's clock.
    """
    current, side = torch.cuda.current_stream(times.device), side_stream(times.device)
    kernels = triton_kernels("block_pool")
    if kernels:
        kernels.arrive(times, waits=True)
        with torch.cuda.stream(side):
            kernels.arrive(times, waits=False)
    current.wait_stream(side)


# -- page_write -------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "effpass::page_write",
    mutates_args=("host", "pages"),
    schema="(Tensor key, Tensor value, Tensor start, Tensor(a!) host, Tensor(b!) pages, Tensor block_table) -> ()",
)
def page_write(key: Tensor, value: Tensor, start: Tensor, host: Tensor, pages: Tensor, block_table: Tensor) -> None:
    """Write the key and value of one token to the host and, if its block has a page, to the page.

    Args:
        key: [B, G, 1, K].
        value: [B, G, 1, V].
        start: int32 [1], slot of the token; nothing is written if it lies past the last slot.
        host: [B, G, N, block, K + V], written.
        pages: [B G C, block, K + V], written.
        block_table: int32 [B, G, N], page of each block; -1 for none.

    Raises:
        EffpassError: if there is more than one token, or sizes don't match.
    """
    if key.is_cuda:
        kernels = triton_kernels("block_pool")
        if kernels:
            _check_write(key, value, host)
            kernels.page_write(key, value, start, host, pages, block_table)
            return
    write_token(key, value, start, host, pages, block_table)


def write_token(key: Tensor, value: Tensor, start: Tensor, host: Tensor, pages: Tensor, block_table: Tensor) -> None:
    """Reference implementation of :func:`page_write`."""
    _check_write(key, value, host)
    n, inside = divmod(int(start), host.shape[3])
    if n < host.shape[2]:
        new, page = torch.cat((key, value), -1)[:, :, 0], block_table[:, :, n]
        host[:, :, n, inside] = new
        there = page >= 0
        pages[page[there].long(), inside] = new[there]


def _check_write(key: Tensor, value: Tensor, host: Tensor) -> None:
    expected = (*host.shape[:2], 1, host.shape[-1])
    if (*key.shape[:3], key.shape[3] + value.shape[3]) != expected or key.shape[:3] != value.shape[:3]:
        raise EffpassError(
            f"effpass::page_write: keys {tuple(key.shape)} and values {tuple(value.shape)} for blocks"
            f" {tuple(host.shape)}",
            hint="one token of each head, whose key and value are as wide as the blocks",
        )


@page_write.register_fake
def _(key, value, start, host, pages, block_table):  # type: ignore[no-untyped-def]
    _check_write(key, value, host)


@register_flop_formula(torch.ops.effpass.page_write)
def _(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 0


# -- fetch_blocks -----------------------------------------------------------------------------------------------------


def _fetch_blocks(
    chosen: Tensor, end: int, host: Tensor, pages: Tensor, block_table: Tensor, owner: Tensor, age: Tensor,
    clock: Tensor, moves: Tensor, moved: Tensor, counts: Tensor, entry: int,
) -> None:  # fmt: skip
    block, of_head, places = host.shape[3], owner.shape[2], moves.shape[2]
    heads = torch.arange(owner.shape[0] * owner.shape[1], device=owner.device)
    first_page = (heads * of_head).view(*owner.shape[:2], 1)
    number = torch.where(chosen < 0, -1, chosen * entry // block).long()
    there = number >= 0
    is_new = there.clone()
    is_new[..., 1:] &= number[..., 1:] != number[..., :-1]
    page = block_table.gather(2, number.clamp(min=0)).long()
    missing = there & (page < 0)
    tokens = torch.ones_like(number) if entry == 1 else (end - number * block).clamp(max=block)
    clock.add_(1)

    after = end // block
    of_after = block_table[:, :, after : after + 1].long()
    asks = of_after < 0  # empty if the cache has no slot for the next token
    wanted = torch.zeros((*owner.shape[:2], of_head + 1), dtype=torch.bool, device=owner.device)
    for at, live in ((page, is_new & ~missing), (of_after, ~asks)):
        wanted.scatter_(2, torch.where(live, at - first_page, of_head), True)
    wanted = wanted[..., :of_head]
    age.copy_(torch.where(wanted, clock[..., None], age))

    copied = is_new & missing & (number != after)
    copied &= copied.cumsum(-1) < places
    count = copied.sum(-1) + asks.sum(-1)
    order = torch.where(wanted, 2**31 - 1, age).argsort(dim=-1, stable=True).argsort(-1)
    into = listed(order < count[..., None], places)
    of_copied = listed(copied, places)
    moves[..., 0] = torch.where(of_copied < 0, after, number.gather(2, of_copied.clamp(min=0).long()))
    moves[..., 1] = first_page + into
    moved.copy_(count)
    found = (is_new, is_new & missing, tokens * there, tokens * missing)
    counts += torch.stack((*(x.sum(-1) for x in found), count), -1)

    b, g, i = (torch.arange(places, device=owner.device) < count[..., None]).nonzero(as_tuple=True)
    n, to = moves[b, g, i].long().unbind(-1)
    own = to - first_page[b, g, 0]
    old = owner[b, g, own].long()
    block_table[b[old >= 0], g[old >= 0], old[old >= 0]] = -1
    owner[b, g, own] = n.to(torch.int32)
    age[b, g, own] = clock[b, g]
    block_table[b, g, n] = to.to(torch.int32)
    pages[to] = host[b, g, n]


@torch.library.custom_op(
    "effpass::fetch_blocks",
    mutates_args=("pages", "block_table", "owner", "age", "clock", "moves", "moved", "counts"),
    schema="(Tensor chosen, Tensor filled, Tensor host, Tensor(a!) pages, Tensor(b!) block_table, Tensor(c!) owner, "
    "Tensor(d!) age, Tensor(e!) clock, Tensor(f!) moves, Tensor(g!) moved, Tensor(h!) counts, int entry) -> ()",
)
def fetch_blocks(
    chosen: Tensor, filled: Tensor, host: Tensor, pages: Tensor, block_table: Tensor, owner: Tensor, age: Tensor,
    clock: Tensor, moves: Tensor, moved: Tensor, counts: Tensor, entry: int,
) -> None:  # fmt: skip
    """Assign pages to the blocks that a step has read and to the next token's block, and copy these blocks.

    On a GPU this runs on :func:`side_stream`, after all work that the current stream has received so far. Code that
    reads pages or the block table later must call :func:`join` first.

    Args:
        chosen: int32 [B, G, L], slots or blocks that the step has chosen, ascending, followed by -1.
        filled: int32 [1], number of slots in use.
        host: [B, G, N, block, W], read. The following tensors are attributes of :class:`BlockPool` and are written.
        pages: [B G C, block, W].
        block_table: int32 [B, G, N].
        owner: int32 [B, G, C].
        age: int32 [B, G, C].
        clock: int32 [B, G].
        moves: int32 [B, G, M, 2].
        moved: int32 [B, G].
        counts: int64 [B, G, 5].
        entry: slots per entry of `chosen`: 1 if it lists slots, the block size if it lists blocks.
    """
    rest = (host, pages, block_table, owner, age, clock, moves, moved, counts, entry)
    if not pages.is_cuda:
        _fetch_blocks(chosen, int(filled), *rest)
        return
    side = side_stream(pages.device)
    side.wait_stream(torch.cuda.current_stream(pages.device))
    kernels = triton_kernels("block_pool")
    with torch.cuda.stream(side):
        if kernels:
            kernels.fetch_blocks(chosen, filled, *rest)
        else:
            _fetch_blocks(chosen, int(filled), *rest)


@fetch_blocks.register_fake
def _(*args: Any) -> None:
    return None


@register_flop_formula(torch.ops.effpass.fetch_blocks)
def _(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 0
