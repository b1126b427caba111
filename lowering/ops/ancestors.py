"""Ancestor relations between the nodes of a token tree, as bit masks.

A token tree holds the draft tokens that speculative decoding verifies in one call of the target model. Bit j % 64 of
word j // 64 of node i is set if node j is an ancestor of node i; every node is its own ancestor. Node 0 is the root,
parents precede their children, and nodes that only pad the tree have no bits set.

Shapes: B batch, N nodes, W words of 64 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MOST_NODES", "WORD", "pack", "relations", "unpack"]

WORD = 64  # nodes per int64 word
MOST_NODES = 256


def pack(bits: Tensor, words: int | None = None) -> Tensor:
    """Pack bool `[..., N]` into int64 `[..., W]`, where W is `words` or, by default, the smallest sufficient number."""
    count = bits.shape[-1]
    words = -(-count // WORD) if words is None else words
    padded = torch.nn.functional.pad(bits.long(), (0, words * WORD - count)).unflatten(-1, (words, WORD))
    return (padded << torch.arange(WORD, device=bits.device)).sum(-1)


def unpack(words: Tensor, count: int) -> Tensor:
    """Unpack the first `count` bits of int64 `[..., W]` into bool `[..., count]`."""
    node = torch.arange(count, device=words.device)
    return (words[..., node // WORD] >> (node % WORD)) & 1 == 1


def relations(parents: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Compute the depth and the ancestors of each node.

    Args:
        parents: int64 `[B, N]`, parent of each node; -1 for the root and for padding.
        depth: maximum depth of a node.

    Returns:
        Depths int64 `[B, N]`, 0 for the root and -1 for padding, and ancestor bits int64 `[B, N, W]`.
    """
    number = torch.arange(parents.shape[1], device=parents.device)
    is_node = (parents >= 0) | (number == 0)
    is_ancestor = (number[:, None] == number) & is_node[:, :, None]
    above = parents
    for _ in range(depth):
        is_ancestor = is_ancestor | (above[:, :, None] == number)
        above = torch.where(above > 0, parents.gather(1, above.clamp(min=0)), -1)
    return is_ancestor.sum(-1) - 1, pack(is_ancestor)
