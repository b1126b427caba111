"""Keep the tokens with the largest importance over all layers together.

This retains the largest possible sum of attention, but may leave some layers with few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effpass.runtime.prefix_kv.policy import Policy

__all__ = ["GlobalTopK"]


class GlobalTopK(Policy):
    """Policy that maximizes Σ_l C_l(K_l), where PrefixKV maximizes min_l C_l(K_l).

    C_l(K) is the share of layer l's attention that its K most important tokens receive.
    """

    name = "global_top_k"
    importance = "full"

    def counts(self, mass: Tensor, totals: Sequence[int], low: Sequence[int], high: Tensor) -> list[list[int]]:
        batch, layers, slots = mass.shape
        gains = mass.diff(dim=2, prepend=mass.new_zeros(batch, layers, 1))
        place = torch.arange(slots, device=mass.device)
        least = torch.tensor(low, device=mass.device)
        gains = gains.masked_fill(place < least[:, None], float("inf"))
        gains = gains.masked_fill(place >= high[:, :, None], -1)
        order = gains.flatten(1).argsort(dim=1, descending=True, stable=True) // slots
        found = []
        for row, total in enumerate(totals):
            kept = order[row, : min(total, int(high[row].sum()))]
            found.append(torch.bincount(kept, minlength=layers).tolist())
        return found
