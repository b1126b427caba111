"""What the router of :mod:`effpass.lowering.ops.routed_blocks` would hold of its own scores, at several budgets.

    C(b) = mean_t,g Σ_(n chosen at budget b) π[t, n]         π[t] = softmax_n(s[t, n]) over visible blocks

SparseBalance's guard (https://arxiv.org/abs/2604.13847) bounds by it how far a budget may move. It stands for quality
and does not promise it. Some hundred tokens tell the mean, so that the curve costs little beside the attention.
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
    """Coverage at each of `budgets`, from tokens evenly spread; does not wait for the device.

    Args:
        q: [T, H, K], as :func:`~effpass.lowering.ops.routed_attention.trainable_sparse_attention` takes it.
        k: [T, G, K].
        cu_seqlens: int32 or int64 [N + 1].
        budgets: int32 or int64 [M], keys; what is below the blocks that are always chosen counts as these.
        block: keys of a block.
        scale: factor on the scores; K^(−1/2) by default.
        rows: how many tokens; all where there are fewer.

    Returns:
        float32 [M].

    Raises:
        EffpassError: sizes or types don't fit.
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
