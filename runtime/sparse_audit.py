"""How good a choice of keys is: what share of the best keys it holds, and of the attention that they would get.

recall = |S ∩ S*| / |S*|,  S* = top-k_t of Σ_h q_h · k_s over all keys (of max_h, where heads are aggregated so)
mass   = Σ_{s in S} a_s,   a = softmax of the full attention, in the mean over heads
"""

from __future__ import annotations

import torch
from torch import Tensor

from effpass.lowering.ops.two_level_attention import top
from effpass.lowering.ops.two_level_attention_index import KeyIndex

__all__ = ["Audit", "chosen_slots", "recall_and_mass"]


class Audit:
    """Sums over the steps of one layer, on its device, so that looking waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def look(
        self, index: KeyIndex, query: Tensor, keys: Tensor, key_positions: Tensor, query_positions: Tensor, scale: float
    ) -> None:
        """Add a step that has chosen; arguments are those of `two_level_attention`."""
        recall, mass = recall_and_mass(index, query, keys, key_positions, query_positions, scale)
        live = (query_positions >= 0).expand_as(recall).double()
        self.sums.add_(torch.stack(((recall * live).sum(), (mass * live).sum(), live.sum())))

    def result(self) -> tuple[float, float]:
        """Mean recall and mass; NaN before the first step. Waits for the device."""
        recall, mass, count = self.sums.tolist()
        return (recall / count, mass / count) if count else (float("nan"), float("nan"))


def chosen_slots(index: KeyIndex, slots: int) -> Tensor:
    """Bool [B, G, slots]: what the last step chose."""
    mask = torch.zeros((*index.seen.shape[:2], slots + 1), dtype=torch.bool, device=index.seen.device)
    chosen = index.chosen_tokens.long()
    if not chosen.shape[2]:
        block = index.selection.block
        inside = torch.arange(block, device=chosen.device)
        chosen = torch.where(
            index.chosen_blocks[..., None] < 0, slots, index.chosen_blocks[..., None].long() * block + inside
        ).flatten(2)
    chosen = torch.where((chosen < 0) | (chosen > slots), slots, chosen)
    return mask.scatter_(2, chosen, True)[..., :slots]


def recall_and_mass(
    index: KeyIndex, query: Tensor, keys: Tensor, key_positions: Tensor, query_positions: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """[B, G] each; looks at every key."""
    (batch, heads, _, size), (_, groups, slots, _) = query.shape, keys.shape
    how = index.selection
    visible = ((key_positions >= 0) & (key_positions <= query_positions))[:, None]
    scores = query.reshape(batch, groups, heads // groups, size).float() @ keys.float().transpose(-1, -2)
    together = scores.sum(2) if how.aggregation == "sum" else scores.amax(2)
    best = top(together.masked_fill(~visible, float("-inf")), min(how.tokens, slots))
    chosen = chosen_slots(index, slots) & visible
    recall = (best & chosen).sum(-1) / best.sum(-1).clamp(min=1)
    weights = (scores * scale).masked_fill(~visible[:, :, None], float("-inf")).softmax(-1).nan_to_num()
    return recall, (weights * chosen[:, :, None]).sum(-1).mean(2)
