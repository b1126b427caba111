"""Which blocks of earlier keys each token attends to: a router without parameters, for training.

    s[t, n] = scale · mean_h(q[t, h]) · mean(k in block n)         over blocks of t's sequence that began before it
    chosen  = the blocks of largest s, ⌈budget / block⌉ at most; the sequence's first block and t's own are always in it

MoBA's router (https://arxiv.org/abs/2502.13189), with grouped queries: h runs over the query heads that share keys, and
they choose together, so that a block is read once for all of them. The choice is made token by token. Tiles of tokens
that choose together would cost less, but a token would then attend to what later tokens asked for, which no decoder can
repeat. There is no gradient through the choice.

Sequences are packed in one row and blocks begin at each sequence's start. The budget is a tensor, read on the device: a
change compiles nothing. Equal inputs give equal choices, so that a checkpoint's recomputation finds the same blocks.

Shapes: T tokens, H query heads, G key-value heads, K key size, N blocks (T // block + sequences, of which the last may
be empty), P places of a list.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.core.errors import EffpassError
from effpass.lowering.ops.kernel_choice import triton_kernels
from effpass.lowering.ops.two_level_attention import listed, top

__all__ = [
    "FORCED", "SIZES", "Blocks", "block_means", "check_block", "check_budget", "places", "route_blocks",
    "router_scores",
]  # fmt: skip

SIZES = (16, 32, 64, 128, 256, 512)
FORCED = 2  # the sequence's first block, and the token's own
_SCORES = 1 << 24  # at once


class Blocks(NamedTuple):
    """Where blocks begin and end, and which of them tokens see.

    Attributes:
        start: int32 [N], the first token of a block; T where there is none.
        stop: int32 [N], the token behind its last.
        first: int32 [T], the first block of a token's sequence.
        own: int32 [T], the block that the token lies in. It sees those from `first` to `own`.
    """

    start: Tensor
    stop: Tensor
    first: Tensor
    own: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int, block: int) -> Blocks:
        """Without waiting for the device."""
        ends = cu_seqlens.to(torch.int32)
        counts = (ends.diff() + block - 1) // block
        until = counts.cumsum(0, dtype=torch.int32)
        before, last = until - counts, counts.shape[0] - 1
        n = torch.arange(tokens // block + counts.shape[0], dtype=torch.int32, device=ends.device)
        t = torch.arange(tokens, dtype=torch.int32, device=ends.device)
        of_n = torch.searchsorted(until, n, right=True).clamp(max=last)
        of_t = torch.searchsorted(ends[1:].contiguous(), t, right=True).clamp(max=last)
        start = (ends[of_n] + (n - before[of_n]) * block).clamp(max=tokens)
        stop = torch.minimum(start + block, ends[of_n + 1])
        return cls(start, stop, before[of_t], before[of_t] + (t - ends[of_t]) // block)


def places(tokens: int, sequences: int, block: int, max_budget: int | None) -> int:
    """The most blocks that a token may choose."""
    blocks = tokens // block + sequences
    return blocks if max_budget is None else min(blocks, -(-max_budget // block))


def check_budget(budget: int, block: int, max_budget: int | None) -> None:
    """Raise an :class:`EffpassError` where the blocks that are always chosen don't fit, or the budget is above its
    bound."""
    if -(-budget // block) < FORCED:
        raise EffpassError(
            f"sparse attention: a budget of {budget} keys is less than the two blocks of {block} that a token always "
            "attends to, its sequence's first and its own",
            hint=f"a budget of {block + 1} keys or more (it is rounded up to whole blocks), or smaller blocks",
        )
    if max_budget is not None and budget > max_budget:
        raise EffpassError(
            f"sparse attention: the budget is {budget} keys and max_budget {max_budget}",
            hint="max_budget is the largest value that the budget takes; lists have room for no more",
        )


def block_means(k: Tensor, blocks: Blocks, block: int) -> Tensor:
    """Mean keys [N, G, K], float32 or float64; zeros for an empty block."""
    at = blocks.start[:, None] + torch.arange(block, dtype=torch.int32, device=k.device)
    inside = (at < blocks.stop[:, None])[..., None, None]
    wide = torch.promote_types(k.dtype, torch.float32)
    kept = k[at.clamp(max=k.shape[0] - 1).long()].to(wide) * inside
    return kept.sum(1) / (blocks.stop - blocks.start).clamp(min=1)[:, None, None]


def router_scores(q: Tensor, means: Tensor, blocks: Blocks, rows: Tensor, scale: float) -> Tensor:
    """s [G, R, N] of the tokens `rows` int64 [R], of the means' type; -inf where a block is not seen."""
    pooled = q[rows].to(means.dtype).unflatten(1, (means.shape[1], -1)).mean(2) * scale
    scores = pooled.transpose(0, 1) @ means.permute(1, 2, 0)
    n = torch.arange(means.shape[0], device=q.device)
    is_seen = (n >= blocks.first[rows, None]) & (n <= blocks.own[rows, None])
    return scores.masked_fill(~is_seen, float("-inf"))


def forced(scores: Tensor, blocks: Blocks, rows: Tensor) -> Tensor:
    """`scores` of :func:`router_scores` with infinity at the blocks that are always chosen."""
    n = torch.arange(scores.shape[-1], device=scores.device)
    is_forced = (n == blocks.first[rows, None]) | (n == blocks.own[rows, None])
    return scores.masked_fill(is_forced, float("inf"))


_SCHEMA = "(Tensor q, Tensor k, Tensor cu_seqlens, Tensor budget, int block, int? max_budget, float scale)"


@torch.library.custom_op("effpass::route_blocks", mutates_args=(), schema=f"{_SCHEMA} -> (Tensor, Tensor)")
def route_blocks(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, budget: Tensor, block: int, max_budget: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The blocks of each token and key-value head, and how much of the router's scores they hold.

    Args:
        q: [T, H, K].
        k: [T, G, K].
        cu_seqlens: int32 or int64 [N + 1], where sequences begin, and T.
        budget: int32 or int64 [], keys that a token attends to; rounded up to whole blocks.
        block: keys of a block.
        max_budget: the largest value that `budget` takes; None for any.
        scale: factor on the scores.

    Returns:
        chosen: int32 [G, T, P], blocks counted over all sequences, ascending; -1 in what is left.
        coverage: float32 [], the share of softmax_n(s[t, n]) that the chosen blocks hold, in the mean of tokens and
            heads.

    Raises:
        EffpassError: sizes or types don't fit; on the CPU also a `cu_seqlens` that does not rise from 0 to T, and a
            budget below the blocks that are always chosen or above `max_budget`, which on a GPU are failed assertions
            of the device.
    """
    check(q, k, cu_seqlens, budget, block, max_budget)
    if q.is_cuda:
        kernels = triton_kernels("routed_blocks")
        if kernels and kernels.supported(q, k, cu_seqlens.shape[0] - 1, block):
            return kernels.route_blocks(q, k, cu_seqlens, budget, block, max_budget, scale)
    check_rises(cu_seqlens, q.shape[0])
    check_budget(int(budget), block, max_budget)
    with torch.autocast(q.device.type, enabled=False):  # inside an operator it would round again
        return _route_blocks(q, k, cu_seqlens, budget, block, max_budget, scale)


def _route_blocks(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, budget: Tensor, block: int, max_budget: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    tokens = q.shape[0]
    blocks = Blocks.of(cu_seqlens, tokens, block)
    means = block_means(k, blocks, block)
    width = places(tokens, cu_seqlens.shape[0] - 1, block, max_budget)
    count = -(-int(budget) // block)
    lists, kept = [], []
    for rows in torch.arange(tokens, device=q.device).split(max(1, _SCORES // (means.shape[0] * means.shape[1]))):
        scores = router_scores(q, means, blocks, rows, scale)
        chosen = top(forced(scores, blocks, rows), count)
        lists.append(listed(chosen, width))
        kept.append((scores.softmax(-1) * chosen).sum(-1))
    return torch.cat(lists, 1), torch.cat(kept, 1).float().mean()


@route_blocks.register_fake
def _(q, k, cu_seqlens, budget, block, max_budget, scale):  # type: ignore[no-untyped-def]
    check(q, k, cu_seqlens, budget, block, max_budget)
    width = places(q.shape[0], cu_seqlens.shape[0] - 1, block, max_budget)
    return q.new_empty((k.shape[1], q.shape[0], width), dtype=torch.int32), q.new_empty((), dtype=torch.float32)


@register_flop_formula(torch.ops.effpass.route_blocks)
def _(q: Any, k: Any, cu_seqlens: Any, budget: Any, block: int, *args: Any, out_val: Any = None, **kwargs: Any) -> Any:
    return q[0] * k[1] * (q[0] // block) * q[2]  # half of the blocks are seen, in the mean of one sequence


# -- bad input --------------------------------------------------------------------------------------------------------


def check(q: Tensor, k: Tensor, cu_seqlens: Tensor, budget: Tensor, block: int, max_budget: int | None) -> None:
    """Raise an :class:`EffpassError` where sizes or types don't fit."""
    check_packed("route_blocks", q, k, cu_seqlens, block)
    if budget.dim() or budget.dtype not in (torch.int32, torch.int64) or budget.device != q.device:
        raise EffpassError(
            f"effpass::route_blocks: budget is {str(budget.dtype).removeprefix('torch.')} {tuple(budget.shape)} on "
            f"{budget.device}, and q on {q.device}",
            hint="the budget is one int32 or int64 without dimensions, on q's device",
        )
    if max_budget is not None:
        check_budget(max_budget, block, None)


def check_packed(op: str, q: Tensor, k: Tensor, cu_seqlens: Tensor, block: int) -> None:
    """Raise an :class:`EffpassError` where packed queries, keys and their sequences don't fit."""
    if q.dim() != 3 or k.dim() != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.shape[0] == 0:
        raise EffpassError(
            f"effpass::{op}: q {tuple(q.shape)} and k {tuple(k.shape)}",
            hint="q is [T, H, K] and k [T, G, K] with T of 1 or more: sequences packed in one row, without a batch",
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.dtype != k.dtype or not q.is_floating_point():
        raise EffpassError(
            f"effpass::{op}: {q.shape[1]} query heads in {q.dtype} over {k.shape[1]} key-value heads in {k.dtype}",
            hint="the key-value heads divide the query heads, and both are of one floating-point type",
        )
    is_list = cu_seqlens.dim() == 1 and cu_seqlens.shape[0] > 1
    if not is_list or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.device != q.device:
        raise EffpassError(
            f"effpass::{op}: cu_seqlens is {str(cu_seqlens.dtype).removeprefix('torch.')} {tuple(cu_seqlens.shape)} on "
            f"{cu_seqlens.device}, and q on {q.device}",
            hint="cu_seqlens is int32 or int64 [N + 1] on q's device: where sequences begin, and the number of tokens",
        )
    check_block(f"effpass::{op}", block)


def check_block(what: str, block: int) -> None:
    """Raise an :class:`EffpassError` for a size that blocks don't have."""
    if block not in SIZES:
        raise EffpassError(f"{what}: blocks of {block} keys", hint=f"block is one of {', '.join(map(str, SIZES))}")


def check_rises(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise an :class:`EffpassError` where `cu_seqlens` does not rise from 0 to `tokens`; waits for its values."""
    ends: list[int] = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in itertools.pairwise(ends)):
        told = str(ends) if len(ends) <= 9 else f"[{', '.join(map(str, ends[:4]))}, ..., {ends[-1]}]"
        raise EffpassError(
            f"sparse attention: cu_seqlens is {told} for {tokens} tokens",
            hint="it rises from 0 to the number of tokens",
        )
