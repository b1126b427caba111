"""Causal attention of a prompt over itself, block-sparse from some length on: what stands in a program for SDPA."""

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
    """Token t attends to tokens up to t, of the blocks that its tile chooses.

    Args:
        query: [B, H, T, K].
        key: [B, G, T, K].
        value: [B, G, T, V].
        scale: factor on the scores.
        density: see :class:`BlockSelection`; so are the rest.
        threshold: share of the pooled weight; 0 for none.
        block_q: queries of a tile.
        block_k: keys of a block.
        sink: blocks kept from the first token on.
        recent: blocks kept in front of a tile.
        dense_below: fewer tokens attend to all.

    Returns:
        [B, H, T, V], contiguous.
    """
    tokens = query.shape[2]
    how = BlockSelection(density, threshold, block_q, block_k, sink, recent)
    if tokens < max(dense_below, how.least(tokens)):
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
    return int(batch * heads * tokens * tokens * (size + value[-1]) * density)
