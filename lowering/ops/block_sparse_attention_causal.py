"""Causal attention of a prompt over itself that becomes block-sparse from a given number of tokens on.

The operator replaces `scaled_dot_product_attention` in programs, where there is no decode cache. Equation and selection
are those of :mod:`effpass.lowering.ops.block_sparse_attention`, with token t at position t.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.lowering.ops.block_sparse_attention import BlockSelection, block_sparse

__all__ = ["block_sparse_causal_attention"]


@torch.library.custom_op(
    "effpass::block_sparse_causal_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, float scale, float density, float threshold, int block_q, "
    "int block_k, int sink, int recent, int dense_below) -> Tensor",
)
def block_sparse_causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, density: float, threshold: float, block_q: int,
    block_k: int, sink: int, recent: int, dense_below: int,
) -> Tensor:  # fmt: skip
    """Let token t attend to the tokens up to t that lie in the blocks chosen by its tile.

    Args:
        query: [B, H, T, K].
        key: [B, G, T, K].
        value: [B, G, T, V].
        scale: factor applied to the scores.
        density: share of the visible blocks that a tile attends to; see :class:`BlockSelection`, also for what follows.
        threshold: share of the pooled weight to hold instead; 0 to use `density`.
        block_q: queries per tile.
        block_k: keys per block.
        sink: number of blocks at the start of the sequence that are always chosen.
        recent: number of blocks before a tile that are always chosen.
        dense_below: number of tokens below which attention is dense.

    Returns:
        [B, H, T, V], contiguous.
    """
    tokens = query.shape[2]
    how = BlockSelection(density, threshold, block_q, block_k, sink, recent)
    if tokens < max(dense_below, how.least):
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.contiguous()
    positions = torch.arange(tokens, dtype=torch.int32, device=query.device).expand(query.shape[0], -1).contiguous()
    return block_sparse(how, query, key, value, positions, positions, scale).transpose(1, 2).contiguous()


@block_sparse_causal_attention.register_fake
def _(query, key, value, *args):  # type: ignore[no-untyped-def]
    return query.new_empty((*query.shape[:3], value.shape[-1]))


@register_flop_formula(torch.ops.effpass.block_sparse_causal_attention)
def _(
    query: Any, key: Any, value: Any, scale: Any, density: Any, *args: Any, out_val: Any = None, **kwargs: Any
) -> Any:
    batch, heads, tokens, size = query
    return batch * heads * tokens * tokens * (size + value[-1]) * round(1000 * density) // 1000
