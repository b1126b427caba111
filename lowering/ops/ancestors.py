"""Who stands above whom in a token tree, as bits.

Bit j % 64 of word j // 64 of node i says that node j is an ancestor of i; a node is its own ancestor. A node stands
behind its parent, the root is node 0, and what only pads a tree has no bits at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MOST_NODES", "WORD", "pack", "relations", "unpack"]

WORD = 64  # nodes that one word speaks for
MOST_NODES = 256


def pack(bits: Tensor, words: int | None = None) -> Tensor:
    """bool `[..., N]` as int64 `[..., W]`; by default as many words as it takes."""
    count = bits.shape[-1]
    words = -(-count // WORD) if words is None else words
    padded = torch.nn.functional.pad(bits.long(), (0, words * WORD - count)).unflatten(-1, (words, WORD))
    return (padded << torch.arange(WORD, device=bits.device)).sum(-1)


def unpack(words: Tensor, count: int) -> Tensor:
    """bool `[..., count]` of int64 `[..., W]`."""
    node = torch.arange(count, device=words.device)
    return (words[..., node // WORD] >> (node % WORD)) & 1 == 1


def relations(parents: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Depths int64 `[B, N]`, 0 for the root and -1 for padding, and ancestors int64 `[B, N, W]`.

    Args:
        parents: int64 `[B, N]`; -1 for the root, and for nodes that only pad the tree.
        depth: the largest depth there can be.
    """
    number = torch.arange(parents.shape[1], device=parents.device)
    is_node = (parents >= 0) | (number == 0)
    is_ancestor = (number[:, None] == number) & is_node[:, :, None]
    above = parents
    for _ in range(depth):
        is_ancestor = is_ancestor | (above[:, :, None] == number)
        above = torch.where(above > 0, parents.gather(1, above.clamp(min=0)), -1)
    return is_ancestor.sum(-1) - 1, pack(is_ancestor)
