"""Quality of the keys S that a step of sparse attention chose: recall of the best keys, and covered attention mass.

    recall = |S ∩ S*| / |S*|         S* = top-k of Σ_h q_h · k_s over all visible keys, k = `selection.tokens`
    mass   = Σ_{s in S} a_s          a = softmax of the full attention

Σ_h runs over the query heads h that share a KV head, and is max_h with aggregation ``"max"``; mass is the mean over
these heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effpass.lowering.ops.two_level_attention import top
from effpass.lowering.ops.two_level_attention_index import KeyIndex

__all__ = ["Audit", "chosen_slots", "recall_and_mass"]


class Audit:
    """Accumulates recall and mass over the decode steps of one layer, on its device and without synchronization.

    Attributes:
        sums: float64 `[3]`, sums of recall and of mass, and the number of summands.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def look(
        self, index: KeyIndex, query: Tensor, keys: Tensor, key_positions: Tensor, query_positions: Tensor, scale: float
    ) -> None:
        """Add the last step, which has chosen its keys; arguments are those of `two_level_attention`."""
        recall, mass = recall_and_mass(index, query, keys, key_positions, query_positions, scale)
        live = (query_positions >= 0).expand_as(recall).double()
        self.sums.add_(torch.stack(((recall * live).sum(), (mass * live).sum(), live.sum())))

    def result(self) -> tuple[float, float]:
        """Return mean recall and mean mass, NaN before the first step; synchronizes with the device."""
        recall, mass, count = self.sums.tolist()
        return (recall / count, mass / count) if count else (float("nan"), float("nan"))


def chosen_slots(index: KeyIndex, slots: int) -> Tensor:
    """Return the mask of the slots that the last step chose, bool [B, G, slots]."""
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
    """Return recall and mass of the last step, [B, G] each; computes the full attention.

    Args:
        index: index of the layer, with the choice of the last step.
        query: [B, H, 1, K], queries of the step.
        keys: [B, G, S, K], keys of all slots.
        key_positions: int32 [B, S], positions of the slots; -1 for an empty slot.
        query_positions: int32 [B, 1], positions of the queries; -1 for an unused sequence.
        scale: factor on the scores.
    """
    (batch, heads, _, size), (_, groups, slots, _) = query.shape, keys.shape
    selection = index.selection
    visible = ((key_positions >= 0) & (key_positions <= query_positions))[:, None]
    scores = query.reshape(batch, groups, heads // groups, size).float() @ keys.float().transpose(-1, -2)
    together = scores.sum(2) if selection.aggregation == "sum" else scores.amax(2)
    best = top(together.masked_fill(~visible, float("-inf")), min(selection.tokens, slots))
    chosen = chosen_slots(index, slots) & visible
    recall = (best & chosen).sum(-1) / best.sum(-1).clamp(min=1)
    weights = (scores * scale).masked_fill(~visible[:, :, None], float("-inf")).softmax(-1).nan_to_num()
    return recall, (weights * chosen[:, :, None]).sum(-1).mean(2)
