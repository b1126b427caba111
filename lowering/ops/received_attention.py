"""Attention that each slot of a KV cache receives from the tokens of a call: column sums of the attention matrix.

    received[s] = 1/H Σ_h Σ_t softmax_s(c(scale · q_t · k_s))      c(x) = softcap · tanh(x / softcap)

The softmax is over the slots s visible to token t, by positions, as in :mod:`effpass.lowering.ops.cached_attention`.
Methods that evict keys rank them by this score (H2O, https://arxiv.org/abs/2306.14048; PrefixKV,
https://arxiv.org/abs/2412.03409). The T × S matrix of a head is never in memory as a whole: the reference processes a
few tokens at a time, and the GPU kernel (:mod:`effpass.lowering.kernels.received_attention`) reads the keys twice,
first for the logarithm of each token's sum of exponentials and then for the sums over tokens.

Shapes: B batch, T tokens, S slots, H query heads, G KV heads, K key size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.core.errors import EffpassError
from effpass.lowering.ops.kernel_choice import triton_kernels

__all__ = ["TOLERANCE", "received_attention"]

#: Maximum deviation of the kernel from the reference, relative to the largest sum. Both compute scores in float32 from
#: unrounded queries and keys; the kernel adds the weights of thousands of tokens in another order.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-4, torch.bfloat16: 2e-4}

_ELEMENTS = 1 << 24  # elements of the matrix at once: a few tensors of 64 MiB


def _received_attention(
    query: Tensor,
    keys: Tensor,
    key_positions: Tensor,
    query_positions: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    (batch, heads, tokens, size), (_, groups, slots, _) = query.shape, keys.shape
    received = torch.zeros(batch, slots, dtype=torch.float32, device=query.device)
    turned = keys.float().transpose(-1, -2)
    step = max(1, _ELEMENTS // max(1, batch * heads * slots))
    of_keys = key_positions[:, None, None, :]
    for first in range(0, tokens, step):
        part = query[:, :, first : first + step].float()
        count = part.shape[2]
        scores = part.reshape(batch, groups, heads // groups * count, size) @ turned
        scores = scores.view(batch, heads, count, slots) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        of_queries = query_positions[:, None, first : first + step, None]
        visible = (of_keys >= 0) & (of_keys <= of_queries)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        received += weights.masked_fill(~visible.any(-1, keepdim=True), 0).sum((1, 2))
    return received / heads


@torch.library.custom_op("effpass::received_attention", mutates_args=())
def received_attention(
    query: Tensor,
    keys: Tensor,
    key_positions: Tensor,
    query_positions: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    """Compute the attention that each slot receives, summed over T tokens and averaged over heads.

    Args:
        query: [B, H, T, K], any strides.
        keys: [B, G, S, K], any strides with the last dimension contiguous; G divides H.
        key_positions: int32 [B, S]; -1 in empty slots and padding, which receive 0.
        query_positions: int32 [B, T]; -1 for padding, which attends to nothing.
        scale: factor applied to the scores.
        softcap: bound on the scores; 0 for none.

    Returns:
        float32 [B, S]; each sequence sums to its number of tokens that see any slot.

    Raises:
        EffpassError: if H is not a multiple of G, or sizes don't match.
    """
    _check(query, keys, key_positions, query_positions)
    kernels = triton_kernels("received_attention") if query.is_cuda else None
    if kernels and kernels.supported(query, keys):
        return kernels.received_attention(query, keys, key_positions, query_positions, scale, softcap)
    return _received_attention(query, keys, key_positions, query_positions, scale, softcap)


def _check(query: Tensor, keys: Tensor, key_positions: Tensor, query_positions: Tensor) -> None:
    batch, heads, tokens, size = query.shape
    if heads % keys.shape[1] or size != keys.shape[3] or batch != keys.shape[0]:
        raise EffpassError(
            f"effpass: queries {tuple(query.shape)} can't attend to keys {tuple(keys.shape)}",
            hint="queries are [B, H, T, K] and keys [B, G, S, K], where G divides H",
        )
    if key_positions.shape != (batch, keys.shape[2]) or query_positions.shape != (batch, tokens):
        raise EffpassError(
            f"effpass: queries {tuple(query.shape)} and keys {tuple(keys.shape)} have key_positions"
            f" {tuple(key_positions.shape)} and query_positions {tuple(query_positions.shape)}",
            hint="key_positions are [B, S] and query_positions [B, T]",
        )


@received_attention.register_fake
def _(query, keys, key_positions, query_positions, scale, softcap):  # type: ignore[no-untyped-def]
    _check(query, keys, key_positions, query_positions)
    return query.new_empty((query.shape[0], keys.shape[2]), dtype=torch.float32)


@register_flop_formula(torch.ops.effpass.received_attention)
def _(query: Any, keys: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> Any:
    batch, heads, tokens, key_size = query
    return 2 * 2 * batch * heads * tokens * keys[2] * key_size  # the scores, twice
