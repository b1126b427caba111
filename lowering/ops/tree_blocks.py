"""Choice of the blocks of a prefix that a token tree attends to: by the root's query and mean keys, for all nodes.

    score of block b of KV head g = Σ_{h of g} q_h · k̄_{g,b}          k̄: mean of the block's keys
    number of kept blocks = ⌈(n₀ + ⌊(n − n₀) · share⌋) / block⌉ for a prefix of n > n₀ slots; all blocks up to n₀

The first and the last two blocks are always kept. The method is that of "Accelerate Speculative Decoding with Sparse
Computation in Verification" (https://arxiv.org/abs/2512.21911) with two differences: the paper chooses over all heads
of a layer together, whereas here each KV head keeps the same number of blocks; and the paper keeps one last block,
which may hold a single token.

Shapes: B batch, H query heads, G KV heads, K key size, S slots, N blocks, M chosen blocks, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.core.errors import EffpassError
from effpass.lowering.ops.kernel_choice import triton_kernels

__all__ = ["LAST", "PARTS", "block_means", "choose_tree_blocks", "most_blocks"]

PARTS = 1024  # denominator of `share`
LAST = 2  # number of blocks at the end of a prefix that are always kept


def most_blocks(slots: int, block: int, dense_below: int, share: int) -> int:
    """Return M, the maximum number of blocks kept of a prefix of up to `slots` slots."""
    kept = slots if slots <= dense_below else dense_below + (slots - dense_below) * share // PARTS
    return max(1 + LAST, -(-max(kept, min(slots, dense_below)) // block))


def _choose_tree_blocks(
    query: Tensor, means: Tensor, lengths: Tensor, most: int, block: int, dense_below: int, share: int
) -> Tensor:
    (batch, heads, size), (_, groups, count, _) = query.shape, means.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    asked = query.to(wide).view(batch, groups, heads // groups, size).sum(2)
    score = (asked[:, :, None] @ means.to(wide).mT)[:, :, 0]
    number = torch.arange(count, device=query.device)
    length = lengths[:, None, None].long()
    blocks = (length + block - 1) // block
    kept = torch.where(length <= dense_below, length, dense_below + (length - dense_below) * share // PARTS)
    wanted = ((kept + block - 1) // block).clamp(min=1 + LAST, max=most)
    score = score.masked_fill((number == 0) | (number >= blocks - LAST), float("inf"))
    score = score.masked_fill(number >= blocks, float("-inf"))
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., :most]
    rank = torch.arange(order.shape[2], device=query.device)
    is_chosen = (rank < wanted) & (order < blocks)
    chosen = torch.where(is_chosen, order, count).sort(-1).values
    chosen = torch.where(chosen < count, chosen, -1).int()
    return torch.nn.functional.pad(chosen, (0, most - chosen.shape[2]), value=-1)


@torch.library.custom_op(
    "effpass::choose_tree_blocks",
    mutates_args=(),
    schema="(Tensor query, Tensor means, Tensor lengths, int most, int block, int dense_below, int share) -> Tensor",
)
def choose_tree_blocks(
    query: Tensor, means: Tensor, lengths: Tensor, most: int, block: int, dense_below: int, share: int
) -> Tensor:
    """Choose blocks of each sequence's prefix for each KV head; among equal scores the first.

    Args:
        query: [B, H, K], query of the root.
        means: [B, G, N, K], mean key of each block.
        lengths: int32 [B], number of slots in each sequence's prefix.
        most: M, from :func:`most_blocks`.
        block: slots per block.
        dense_below: n₀, number of slots up to which all blocks are kept.
        share: share of the slots beyond n₀ to keep, in units of 1 / :data:`PARTS`.

    Returns:
        int32 [B, G, M], chosen blocks, ascending, followed by -1.

    Raises:
        EffpassError: if sizes don't match.
    """
    _check(query, means, lengths)
    return _choose_tree_blocks(query, means, lengths, most, block, dense_below, share)


def _check(query: Tensor, means: Tensor, lengths: Tensor) -> None:
    (batch, heads, size), (rows, groups, _, of_means) = query.shape, means.shape
    if batch != rows or heads % groups or size != of_means or lengths.shape != (batch,):
        raise EffpassError(
            f"effpass::choose_tree_blocks: queries {tuple(query.shape)}, means {tuple(means.shape)} and lengths"
            f" {tuple(lengths.shape)}",
            hint="they are [B, H, K], [B, G, N, K] and [B], where G divides H",
        )


@choose_tree_blocks.register_fake
def _(query, means, lengths, most, block, dense_below, share):  # type: ignore[no-untyped-def]
    _check(query, means, lengths)
    return lengths.new_empty((*means.shape[:2], most))


@choose_tree_blocks.register_kernel("cuda")
def _(query, means, lengths, most, block, dense_below, share):  # type: ignore[no-untyped-def]
    _check(query, means, lengths)
    kernels = triton_kernels("tree_blocks")
    run = kernels.choose_tree_blocks if kernels and kernels.supported(query, means) else _choose_tree_blocks
    return run(query, means, lengths, most, block, dense_below, share)


@register_flop_formula(torch.ops.effpass.choose_tree_blocks)
def _(query: Any, means: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> Any:
    batch, groups, count, size = means
    return 2 * batch * groups * count * size


def block_means(keys: Tensor, positions: Tensor, lengths: Tensor, means: Tensor, block: int, width: int) -> None:
    """Update the mean keys of the blocks that hold the last `width` slots of each sequence's prefix.

    The number of kernel launches is small and depends neither on the number of layers nor on the prefix; the host does
    not wait.

    Args:
        keys: [L, B, G, S, K].
        positions: int32 [B, S]; -1 for padding, which is excluded from the means.
        lengths: int32 [B], number of slots in each sequence's prefix.
        means: [L, B, G, N, K], written.
        block: slots per block.
        width: number of slots that may have changed, at least 1.
    """
    layers, batch, groups, slots, size = keys.shape
    touched = min(means.shape[3], -(-width // block) + 1)
    last = (lengths.long()[:, None] - 1).clamp(min=0) // block
    blocks = (last - torch.arange(touched, device=keys.device)).clamp(min=0)  # block 0 may repeat
    place = (blocks[:, :, None] * block + torch.arange(block, device=keys.device)).flatten(1)
    inside = (place < lengths[:, None]) & (positions.gather(1, place.clamp(max=slots - 1)) >= 0)
    index = place.clamp(max=slots - 1)[None, :, None, :, None].expand(layers, -1, groups, -1, size)
    read = keys.gather(3, index).float() * inside[None, :, None, :, None]
    total = read.view(layers, batch, groups, touched, block, size).sum(4)
    count = inside.view(batch, touched, block).sum(2).clamp(min=1)
    where = blocks[None, :, None, :, None].expand(layers, -1, groups, -1, size)
    means.scatter_(3, where, (total / count[None, :, None, :, None]).to(means.dtype))
