"""Keys and values in host memory, and copies of some of their blocks on the device.

    host   [B, G, N, block, W]   of every token, keys and values side by side; of latents (MLA) both at once
    pages  [B G C, block, W]     copies of blocks on the device, C of each head

A step writes its token to both. It reads each key that it chose from a page where the key's block has one, and else
from the host itself, through the bus (:mod:`~effpass.lowering.ops.two_level_attention`): where a block is costs time
and changes no result, and nothing that is evicted has to be written back. After a step has attended, blocks that it
read and that have no page get one, for the steps to come, since choices change little from one step to the next:

    read    = blocks of the chosen keys
    wanted  = read ∪ {the block of the next token}
    copied  = wanted without a page, up to a bound; the next token's always
    evicted = the pages that were longest not wanted (LRU), as many as are copied; of equal ones the first

Attention waits for none of the copies: on a GPU they run on a stream of their own, and have until the end of the step
(:func:`join`).

Shapes: B batch, G key-value heads, N blocks, C pages of a head, M places of a list of copies, W = K + V, or of latents
W = K.
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

#: Columns of :attr:`BlockPool.counts`, sums over steps: blocks with a chosen key, and those of them without a page;
#: chosen keys, and those of them that came through the bus; blocks that were copied.
COUNTED = ("blocks", "missing_blocks", "tokens", "missing_tokens", "copied")


@dataclass(frozen=True)
class BlockPool:
    """One layer's blocks, in tensors that stay where they are.

    Attributes:
        host: `[B, G, N, block, W]`, host memory as the device sees it.
        pages: `[B G C, block, W]`; head h = b G + g has pages h C to (h + 1) C.
        block_table: int32 `[B, G, N]`: the page of each block, -1 for none.
        owner: int32 `[B, G, C]`: the block in each page, -1 for none.
        age: int32 `[B, G, C]`: when the page was last wanted, by `clock`; -1 for a free one.
        clock: int32 `[B, G]`: steps so far.
        moves: int32 `[B, G, M, 2]`: block and page of each copy that the last step asked for, and
        moved: int32 `[B, G]`: how many there are.
        counts: int64 `[B, G, 5]`, see :data:`COUNTED`.
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
        """A pool that holds nothing, on the device that sees `host`.

        Args:
            host: `[B, G, N, block, W]`.
            slots: pages C of a head; no more than N are made.
            most: blocks that a step chooses at most.
            copies: blocks of a head that a step may have copied, beside the next token's.

        Raises:
            EffpassError: fewer pages than a step wants.
        """
        batch, groups, blocks, block, width = host.shape
        slots, wanted = min(slots, blocks), min(most + 1, blocks)
        if slots < wanted:
            raise EffpassError(
                f"a pool of {slots} blocks, and a step wants {wanted}: those that it chooses, and the next token's",
                hint=f"give the pool {wanted} blocks or more, or let a step choose fewer",
            )

        def some(*shape: int, value: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full((batch, groups, *shape), value, dtype=dtype, device=host.device)

        # Zeros: a masked slot has weight 0, and 0 times what happened to lie in memory may be NaN.
        pages = torch.zeros(batch * groups * slots, block, width, dtype=host.dtype, device=host.device)
        return cls(
            host, pages, some(blocks, value=-1), some(slots, value=-1), some(slots, value=-1), some(),
            some(min(copies, most) + 1, 2), some(), some(len(COUNTED), dtype=torch.int64),
        )  # fmt: skip

    def rows(self, count: int) -> BlockPool:
        """Of the first `count` rows; views."""
        if count == self.host.shape[0]:
            return self
        names = ("host", "block_table", "owner", "age", "clock", "moves", "moved", "counts")
        pages = self.pages[: count * self.owner.shape[1] * self.owner.shape[2]]
        return replace(self, pages=pages, **{name: getattr(self, name)[:count] for name in names})

    def cached(self, key_size: int, value_size: int) -> tuple[Tensor, Tensor]:
        """Pages `[B G C, block, K]` of keys, and of values; views."""
        return parted(self.pages, key_size, value_size)

    def write(self, key: Tensor, value: Tensor, start: Tensor) -> None:
        """:func:`page_write` of the first rows."""
        of = self.rows(key.shape[0])
        torch.ops.effpass.page_write(key, value, start, of.host, of.pages, of.block_table)

    def fetch(self, chosen: Tensor, filled: Tensor, entry: int) -> None:
        """:func:`fetch_blocks` of the first rows."""
        of = self.rows(chosen.shape[0])
        torch.ops.effpass.fetch_blocks(
            chosen, filled, of.host, of.pages, of.block_table, of.owner, of.age, of.clock, of.moves, of.moved,
            of.counts, entry,
        )  # fmt: skip

    def forget(self, first: int = 0) -> None:
        """Take back the pages of the blocks from `first` on: their host memory is written without a look at pages."""
        self.block_table[:, :, first:] = -1
        gone = self.owner >= first
        self.owner.masked_fill_(gone, -1)
        self.age.masked_fill_(gone, -1)


# -- a stream beside --------------------------------------------------------------------------------------------------


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on `device` for copies that computation does not wait for."""
    return torch.cuda.Stream(device)


def join(times: Tensor) -> None:
    """Make the current stream wait for the copies that its step has asked for; in a CUDA graph too.

    Args:
        times: int64 `[3]` on the GPU, zeros at first; the last is the sum of all waits, in ns of the device's clock.
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
    """A token's keys and values, to the host, and to the page of its block where there is one.

    Args:
        key: [B, G, 1, K].
        value: [B, G, 1, V].
        start: int32 [1], the token's slot; nothing is written behind the last one.
        host: [B, G, N, block, K + V], written.
        pages: [B G C, block, K + V], written.
        block_table: int32 [B, G, N].

    Raises:
        EffpassError: more than one token, or sizes that don't match.
    """
    if key.is_cuda:
        kernels = triton_kernels("block_pool")
        if kernels:
            _check_write(key, value, host)
            kernels.page_write(key, value, start, host, pages, block_table)
            return
    write_token(key, value, start, host, pages, block_table)


def write_token(key: Tensor, value: Tensor, start: Tensor, host: Tensor, pages: Tensor, block_table: Tensor) -> None:
    """The reference of :func:`page_write`."""
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
    asks = of_after < 0  # none where the cache ends
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
    """Give pages to the blocks that a step has read, and to the one of the next token.

    On a GPU this is on :func:`side_stream`, behind what the current stream was given so far; whoever reads pages or
    table later calls :func:`join`.

    Args:
        chosen: int32 [B, G, L], the slots or blocks that the step has chosen, ascending, -1 behind them.
        filled: int32 [1], the slots in use.
        host: [B, G, N, block, W], read; what follows is written, see :class:`BlockPool`.
        pages: [B G C, block, W].
        block_table: int32 [B, G, N].
        owner: int32 [B, G, C].
        age: int32 [B, G, C].
        clock: int32 [B, G].
        moves: int32 [B, G, M, 2].
        moved: int32 [B, G].
        counts: int64 [B, G, 5].
        entry: slots of an entry of `chosen`: 1, or those of a block.
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
