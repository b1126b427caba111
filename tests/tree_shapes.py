"""Random token trees, and their ancestors in bits, one by one."""

from __future__ import annotations

import torch
from torch import Tensor


def random_parents(nodes: int, padding: int, seed: int) -> list[int]:
    """A tree whose last `padding` nodes are none."""
    generator = torch.Generator().manual_seed(seed)
    parents = [-1]
    for node in range(1, nodes):
        parents.append(-1 if node >= nodes - padding else int(torch.randint(node, (), generator=generator)))
    return parents


def ancestors_of(node: int, parents: list[int]) -> list[int]:
    """The node and those above it; none for padding."""
    if node and parents[node] < 0:
        return []
    found = [node]
    while found[-1]:
        found.append(parents[found[-1]])
    return found


def words_of(nodes: list[list[int]], words: int) -> Tensor:
    """int64 `[N, W]` with bits, the sign's too."""
    out = torch.zeros(len(nodes), words, dtype=torch.long)
    for i, above in enumerate(nodes):
        for j in above:
            bit = 1 << (j % 64)
            out[i, j // 64] |= bit - (1 << 64) if bit >= 1 << 63 else bit
    return out
