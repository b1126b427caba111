"""What a head's proposals lose against the model, and how many of them would be accepted.

    loss = Σ_s decay^s Σ_t w_t KL(p_t ‖ q_t^s) / Σ_s decay^s

p is the model's distribution, over the tokens that the head knows and renormalised, q^s the head's at its step s.

Shapes: B rows, T tokens, V vocabulary, U the draft's, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effpass.trainers.draft.unrolled import reaches

__all__ = ["accepted", "divergence"]


def divergence(
    proposed: Sequence[Tensor], target: Tensor, tokens: Tensor, position_ids: Tensor, weights: Tensor, decay: float
) -> Tensor:
    """The loss.

    Args:
        proposed: S logits `[B, T, U]`; those of step s at t speak of token t + 2 + s.
        target: the model's logits `[B, T, V]`; those at t speak of token t + 1.
        tokens: int64 `[U]`, that the head knows.
        position_ids: int64 `[B, T]`.
        weights: float `[B, T]` of foreseeing each token; 0 where nobody asks.
        decay: weight of a step relative to the one before.
    """
    known = target.index_select(2, tokens)
    total, sum_of_weights = weights.new_zeros(()), 0.0
    for step, logits in enumerate(proposed):
        last = logits.shape[1] - 2 - step
        if last <= 0:
            break
        log_q = logits[:, :last].float().log_softmax(-1)
        log_p = known[:, 1 + step : -1].float().log_softmax(-1)
        lost = (log_p.exp() * (log_p - log_q)).sum(-1)
        counts = weights[:, 2 + step :] * reaches(position_ids, 1 + step)[:, :last]
        total = total + decay**step * (lost * counts).sum()
        sum_of_weights += decay**step
    return total / max(sum_of_weights, 1.0)


def accepted(
    proposed: Sequence[Tensor], target: Tensor, tokens: Tensor, position_ids: Tensor, graded: Tensor
) -> tuple[Tensor, Tensor]:
    """How many proposals of a chain in a row are the model's best tokens, summed over starts, and how many starts.

    Args:
        proposed, target, tokens, position_ids: as above.
        graded: bool `[B, T]`; a start counts where its first proposal is graded and its last one of the same text.
    """
    steps = len(proposed)
    last = target.shape[1] - 1 - steps
    if last <= 0:
        return target.new_zeros((), dtype=torch.float64), target.new_zeros((), dtype=torch.float64)
    best = target.argmax(-1)
    right = torch.ones_like(graded[:, :last])
    runs = torch.zeros_like(best[:, :last], dtype=torch.float64)
    for step, logits in enumerate(proposed):
        right = right & (tokens[logits[:, :last].argmax(-1)] == best[:, 1 + step : 1 + step + last])
        runs += right
    counts = graded[:, 2 : 2 + last] & reaches(position_ids, steps)[:, :last]
    return (runs * counts).sum(), counts.sum().double()
