"""The loss of a draft head against its model, and the number of its proposals that the model would accept.

    loss = Σ_s decay^s Σ_t w_t KL(p_t ‖ q_t^s) / Σ_s decay^s

p is the model's distribution, renormalized over the tokens of the head's vocabulary; q^s is the head's distribution at
unrolled step s (:mod:`effpass.trainers.draft.unrolled`); w are weights of the tokens.

Shapes: B batch, T tokens, V vocabulary of the model, U vocabulary of the draft, S steps.
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
    """Compute the loss.

    Args:
        proposed: for each step, logits `[B, T, U]` of the head; those of step s at t predict token t + 2 + s.
        target: `[B, T, V]`, logits of the model; those at t predict token t + 1.
        tokens: int64 `[U]`, vocabulary of the head.
        position_ids: int64 `[B, T]`, positions of the tokens, which start at 0 in each text of a row.
        weights: float `[B, T]`, weight of predicting each token; 0 for tokens that do not count.
        decay: weight of a step relative to the step before.
    """
    log_p = target.index_select(2, tokens).log_softmax(-1, dtype=torch.float32)
    p = log_p.exp()
    certainty = (p * log_p).sum(-1)
    total, sum_of_weights = weights.new_zeros(()), 0.0
    for step, logits in enumerate(proposed):
        last = logits.shape[1] - 2 - step
        if last <= 0:
            break
        log_q = logits[:, :last].log_softmax(-1, dtype=torch.float32)
        lost = certainty[:, 1 + step : -1] - (p[:, 1 + step : -1] * log_q).sum(-1)
        counts = weights[:, 2 + step :] * reaches(position_ids, 1 + step)[:, :last]
        total = total + decay**step * (lost * counts).sum()
        sum_of_weights += decay**step
    return total / max(sum_of_weights, 1.0)


def accepted(
    proposed: Sequence[Tensor], target: Tensor, tokens: Tensor, position_ids: Tensor, graded: Tensor
) -> tuple[Tensor, Tensor]:
    """Count the proposals that the model accepts of chains that start at each token.

    A proposal is accepted if it and all proposals before it in the chain are the model's best tokens.

    Args:
        proposed, target, tokens, position_ids: as for :func:`divergence`.
        graded: bool `[B, T]`, tokens that count. A start counts if the token of its first proposal does, and its last
            proposal belongs to the same text.

    Returns:
        Number of accepted proposals, summed over starts, and number of starts; both float64 `[]`.
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
