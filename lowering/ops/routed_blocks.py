"""Parameter-free router that chooses the blocks of earlier keys that each token attends to, for training.

    s[t, n] = scale · mean_h(q[t, h]) · mean(k in block n)         over blocks of t's sequence that began before it
    chosen  = the blocks of largest s, ⌈budget / block⌉ at most; always with the sequence's first block and t's own

This is the router of MoBA (https://arxiv.org/abs/2502.13189) with grouped queries: h runs over the query heads of a KV
head, which choose together, so that a block is read once for all of them. Every token chooses for itself. A choice
shared by a tile of tokens would cost less, but would let a token attend to blocks requested by later tokens, which
decoding cannot reproduce. No gradient flows through the choice.

Sequences are packed along T, and blocks begin at the start of each sequence. The budget is a tensor that is read on the
device, so that changing it does not recompile. Equal inputs give equal choices, so that activation checkpointing
recomputes the same blocks.

Shapes: T tokens, H query heads, G KV heads, K key size, N blocks (T // block + number of sequences, of which the last
may be empty), P capacity of a list of blocks.
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
FORCED = 2  # blocks that are always chosen: the sequence's first one and the token's own
_SCORES = 1 << 24  # scores that are computed at once


class Blocks(NamedTuple):
    """Extents of the blocks, and the blocks visible to each token.

    Attributes:
        start: int32 [N], first token of each block; T for an empty block.
        stop: int32 [N], end of each block, exclusive.
        first: int32 [T], first block of each token's sequence.
        own: int32 [T], block that each token lies in; blocks from `first` to `own` are visible to the token.
    """

    start: Tensor
    stop: Tensor
    first: Tensor
    own: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int, block: int) -> Blocks:
        """Compute the blocks without waiting for the device."""
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
    """Return the maximum number of blocks that a token may choose."""
    blocks = tokens // block + sequences
    return blocks if max_budget is None else min(blocks, -(-max_budget // block))


def check_budget(budget: int, block: int, max_budget: int | None) -> None:
    """Raise an :class:`EffpassError` if the budget exceeds `max_budget` or does not hold the always chosen blocks."""
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
    """Mean keys of the blocks [N, G, K], float32 or float64; zeros for an empty block."""
    at = blocks.start[:, None] + torch.arange(block, dtype=torch.int32, device=k.device)
    inside = (at < blocks.stop[:, None])[..., None, None]
    wide = torch.promote_types(k.dtype, torch.float32)
    kept = k[at.clamp(max=k.shape[0] - 1).long()].to(wide) * inside
    return kept.sum(1) / (blocks.stop - blocks.start).clamp(min=1)[:, None, None]


def router_scores(q: Tensor, means: Tensor, blocks: Blocks, rows: Tensor, scale: float) -> Tensor:
    """Scores s [G, R, N] of the tokens `rows` int64 [R], in the dtype of `means`; -inf for invisible blocks."""
    pooled = q[rows].to(means.dtype).unflatten(1, (means.shape[1], -1)).mean(2) * scale
    scores = pooled.transpose(0, 1) @ means.permute(1, 2, 0)
    n = torch.arange(means.shape[0], device=q.device)
    is_seen = (n >= blocks.first[rows, None]) & (n <= blocks.own[rows, None])
    return scores.masked_fill(~is_seen, float("-inf"))


def forced(scores: Tensor, blocks: Blocks, rows: Tensor) -> Tensor:
    """Return the scores of :func:`router_scores` with infinity at the blocks that are always chosen."""
    n = torch.arange(scores.shape[-1], device=scores.device)
    is_forced = (n == blocks.first[rows, None]) | (n == blocks.own[rows, None])
    return scores.masked_fill(is_forced, float("inf"))


_SCHEMA = "(Tensor q, Tensor k, Tensor cu_seqlens, Tensor budget, int block, int? max_budget, float scale)"


@torch.library.custom_op("effpass::route_blocks", mutates_args=(), schema=f"{_SCHEMA} -> (Tensor, Tensor)")
def route_blocks(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, budget: Tensor, block: int, max_budget: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Choose the blocks of each token and KV head, and compute the share of the router's softmax that they hold.

    Args:
        q: [T, H, K].
        k: [T, G, K].
        cu_seqlens: int32 or int64, offsets of the sequences, ending with T.
        budget: int32 or int64 [], number of keys that a token attends to, rounded up to whole blocks.
        block: keys per block.
        max_budget: largest value of `budget`; None for no limit.
        scale: factor applied to the scores.

    Returns:
        chosen: int32 [G, T, P], chosen blocks, numbered over all sequences; ascending, followed by -1.
        coverage: float32 [], share of softmax_n(s[t, n]) that the chosen blocks hold, averaged over tokens and KV
            heads.

    Raises:
        EffpassError: if sizes or dtypes don't fit; on the CPU also if `cu_seqlens` does not rise from 0 to T, or the
            budget exceeds `max_budget` or does not hold the always chosen blocks. On a GPU these cases fail a device
            assertion.
    """
    check(q, k, cu_seqlens, budget, block, max_budget)
    if q.is_cuda:
        kernels = triton_kernels("routed_blocks")
        if kernels and kernels.supported(q, k, cu_seqlens.shape[0] - 1, block):
            return kernels.route_blocks(q, k, cu_seqlens, budget, block, max_budget, scale)
    check_rises(cu_seqlens, q.shape[0])
    check_budget(int(budget), block, max_budget)
    with torch.autocast(q.device.type, enabled=False):  # autocast inside an operator would round again
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
    return q[0] * k[1] * (q[0] // block) * q[2]  # tokens of one sequence see half of its blocks on average


# -- input checks -----------------------------------------------------------------------------------------------------


def check(q: Tensor, k: Tensor, cu_seqlens: Tensor, budget: Tensor, block: int, max_budget: int | None) -> None:
    """Raise an :class:`EffpassError` if sizes or dtypes don't fit."""
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
    """Raise an :class:`EffpassError` if packed queries, keys and sequence offsets don't fit together."""
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
    """Raise an :class:`EffpassError` if `block` is not a supported block size."""
    if block not in SIZES:
        raise EffpassError(f"{what}: blocks of {block} keys", hint=f"block is one of {', '.join(map(str, SIZES))}")


def check_rises(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise an :class:`EffpassError` if `cu_seqlens` does not rise from 0 to `tokens`; waits for the device."""
    ends: list[int] = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in itertools.pairwise(ends)):
        shown = str(ends) if len(ends) <= 9 else f"[{', '.join(map(str, ends[:4]))}, ..., {ends[-1]}]"
        raise EffpassError(
            f"sparse attention: cu_seqlens is {shown} for {tokens} tokens",
            hint="it rises from 0 to the number of tokens",
        )
