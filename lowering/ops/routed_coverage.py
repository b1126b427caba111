"""Coverage of the router of :mod:`effpass.lowering.ops.routed_blocks` at several budgets.

    C(b) = mean_t,g Σ_(n chosen at budget b) π[t, n]         π[t] = softmax_n(s[t, n]) over visible blocks

Coverage is the share of its own softmax that the router would keep. The guard of SparseBalance
(https://arxiv.org/abs/2604.13847) uses it to bound how far a budget may move. It is a proxy for quality, not a
guarantee. A few hundred tokens suffice to estimate the mean, so that the curve is cheap compared to attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effpass.core.errors import EffpassError
from effpass.lowering.ops.routed_blocks import FORCED, Blocks, block_means, check_packed, forced, router_scores

__all__ = ["coverage_curve"]


@torch.no_grad()
def coverage_curve(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    budgets: Tensor,
    *,
    block: int = 256,
    scale: float | None = None,
    rows: int = 512,
) -> Tensor:
    """Estimate the coverage at each of `budgets` from evenly spaced tokens. The host does not wait for the device.

    Args:
        q: [T, H, K], as in :func:`~effpass.lowering.ops.routed_attention.trainable_sparse_attention`.
        k: [T, G, K].
        cu_seqlens: int32 or int64 [N + 1], offsets of the sequences, ending with T.
        budgets: int32 or int64 [M], numbers of keys; raised to the blocks that are always chosen.
        block: keys per block.
        scale: factor applied to the scores; K^(−1/2) by default.
        rows: maximum number of tokens to sample.

    Returns:
        float32 [M].

    Raises:
        EffpassError: if sizes or dtypes don't fit.
    """
    check_packed("coverage_curve", q, k, cu_seqlens, block)
    if budgets.dim() != 1 or budgets.is_floating_point() or rows < 1:
        kind = str(budgets.dtype).removeprefix("torch.")
        raise EffpassError(
            f"coverage_curve: budgets are {kind} {tuple(budgets.shape)}, rows {rows}",
            hint="budgets are int32 or int64 [M], and rows 1 or more",
        )
    tokens, rows = q.shape[0], min(rows, q.shape[0])
    blocks = Blocks.of(cu_seqlens, tokens, block)
    at = torch.arange(rows, device=q.device) * tokens // rows
    scores = router_scores(
        q, block_means(k, blocks, block), blocks, at, q.shape[-1] ** -0.5 if scale is None else scale
    )
    order = forced(scores, blocks, at).argsort(dim=-1, descending=True, stable=True)
    held = scores.softmax(-1).gather(-1, order).cumsum(-1).mean((0, 1))
    counts = ((budgets + block - 1) // block).clamp(min=FORCED, max=held.shape[0])
    return held[counts.long() - 1].float()
