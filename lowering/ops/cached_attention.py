"""Attention over a cache of fixed size whose slots know the positions of their tokens, and writing to that cache.

    out[t] = Σ_s softmax_s(c(scale · q_t · k_s)) v_s      over slots s visible to t;  c(x) = softcap · tanh(x / softcap)
    s is visible to t  ⇔  0 ≤ p_s ≤ p_t  and  (window = 0 or p_t − p_s < window)

p is a token's position; -1 marks an empty slot and padding. A query that sees no slot gives 0. Masks from stored
positions need no order and no common length: padding on either side, slots that were dropped, rolling windows.

Shapes: B batch, T new tokens, S slots, H query heads, G key-value heads, K key size, V value size, R rotated features.
Every slot holds finite numbers (a new cache is zeros): a masked slot has weight 0, and 0 · NaN is NaN.

The cache is written through `keys` and `values` in place, so these operators have no gradients, except
`cached_attention`, which only reads. GPU kernels are in :mod:`effpass.lowering.kernels.decode_attention` (few tokens),
:mod:`effpass.lowering.kernels.prefill_attention` (many), and :mod:`effpass.lowering.kernels.latent_attention` (one
token over latents: `values` is a view of the first V channels of `keys`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.core.errors import EffpassError
from effpass.lowering.ops.fused_linear import rms_norm
from effpass.lowering.ops.kernel_choice import triton_kernels
from effpass.lowering.ops.recomputed import differentiate_by_reference

__all__ = ["TOLERANCE", "cache_write", "cached_attention", "has_kernel", "rope_cached_attention", "rotate"]

#: What an output of a kernel may differ from the reference, relative to the largest value of the output. Scores and
#: sums are float32 in both. The kernel rounds the weights of the softmax to the cache's type before the second product,
#: and in `rope_cached_attention` keeps float32 between norm and rotation.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float64: 1e-6}


def has_kernel(device: torch.device, dtype: torch.dtype, rows: int) -> bool:
    """Whether a GPU kernel takes `rows` tokens of a type. Where a head's size does not fit, the reference runs."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    kernels = triton_kernels("decode_attention")
    return kernels is not None and rows <= kernels.MOST_ROWS


# -- cache_write ------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "effpass::cache_write",
    mutates_args=("keys", "values"),
    schema="(Tensor(a!) keys, Tensor(b!) values, Tensor new_keys, Tensor new_values, Tensor start) -> ()",
)
def cache_write(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, start: Tensor) -> None:
    """Write the keys and values of T tokens to slots start ... start + T - 1.

    Args:
        keys: [B, G, S, K], written.
        values: [B, G, S, V], written.
        new_keys: [B, G, T, K], any strides.
        new_values: [B, G, T, V], any strides.
        start: int32 [1].

    Raises:
        EffpassError: on the CPU, when the slots end before the tokens. On a GPU nothing may wait for `start`, and the
            caller answers for it.
    """
    _write(keys, values, new_keys, new_values, start)


def _write(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, start: Tensor) -> None:
    if keys.is_cuda:
        places = start.long() + torch.arange(new_keys.shape[2], device=start.device)
        keys.index_copy_(2, places, new_keys.to(keys.dtype))
        values.index_copy_(2, places, new_values.to(values.dtype))
        return
    first, tokens, slots = int(start), new_keys.shape[2], keys.shape[2]
    if first < 0 or first + tokens > slots:
        raise EffpassError(
            f"effpass::cache_write: {tokens} tokens from slot {first} on don't fit into {slots} slots",
            hint="give the cache more slots, or the call fewer tokens",
        )
    keys[:, :, first : first + tokens] = new_keys
    values[:, :, first : first + tokens] = new_values


@cache_write.register_fake
def _(keys, values, new_keys, new_values, start):  # type: ignore[no-untyped-def]
    return None


@register_flop_formula(torch.ops.effpass.cache_write)
def _(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 0


# -- cached_attention -------------------------------------------------------------------------------------------------


def _cached_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_positions: Tensor,
    query_positions: Tensor,
    filled: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    (batch, heads, tokens, key_size), (_, groups, slots, value_size) = query.shape, values.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).reshape(batch, groups, heads // groups * tokens, key_size)
    scores = (grouped @ keys.to(wide).transpose(-1, -2)).view(batch, heads, tokens, slots) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    of_keys, of_queries = key_positions[:, None, None, :], query_positions[:, None, :, None]
    visible = (of_keys >= 0) & (of_keys <= of_queries)
    if window:
        visible = visible & (of_queries - of_keys < window)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0)
    out = weights.view(batch, groups, heads // groups * tokens, slots) @ values.to(wide)
    return out.view(batch, heads, tokens, value_size).transpose(1, 2).to(query.dtype).contiguous()


@torch.library.custom_op(
    "effpass::cached_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor keys, Tensor values, Tensor key_positions, Tensor query_positions, Tensor filled, "
    "float scale, int window, float softcap) -> Tensor",
)
def cached_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_positions: Tensor,
    query_positions: Tensor,
    filled: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Attention of T tokens over the cache; query heads share the keys of their group, which are not copied.

    Args:
        query: [B, H, T, K], any strides.
        keys: [B, G, S, K], any strides with the last dimension contiguous.
        values: [B, G, S, V], likewise.
        key_positions: int32 [B, S]; -1 in empty slots and padding.
        query_positions: int32 [B, T]; -1 for padding.
        filled: int32 [1]; the slots from it on are empty, so that nobody needs to look at them.
        scale: factor on the scores.
        window: how many positions a query sees, its own included; 0 for all before it.
        softcap: bound on the scores; 0 for none.

    Returns:
        [B, T, H, V], contiguous.

    Raises:
        EffpassError: H is no multiple of G, or sizes don't match.
    """
    return _attend(query, keys, values, key_positions, query_positions, filled, scale, window, softcap)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_positions: Tensor,
    query_positions: Tensor,
    filled: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    _check(query.shape[1], query.shape[2], query.shape[3], keys, values, key_positions, query_positions)
    if query.is_cuda:
        arguments = (query, keys, values, key_positions, query_positions, filled, scale, window, softcap)
        names = ("decode_attention", "prefill_attention")
        for name in names if window else ("latent_attention", *names):
            kernels = triton_kernels(name)
            if kernels and kernels.supported(query, keys, values):
                return kernels.cached_attention(*arguments)
        return _cached_attention(*arguments)
    end = min(max(int(filled), 0), keys.shape[2])  # the empty slots of a large cache would be most of the work
    slots = (keys[:, :, :end], values[:, :, :end], key_positions[:, :end])
    return _cached_attention(query, *slots, query_positions, filled, scale, window, softcap)


def _check(
    heads: int, tokens: int, key_size: int, keys: Tensor, values: Tensor, key_positions: Tensor, query_positions: Tensor
) -> None:
    batch, groups, slots, size = keys.shape
    if heads % groups or key_size != size or values.shape[:3] != keys.shape[:3]:
        raise EffpassError(
            f"effpass: {heads} query heads of size {key_size} can't attend to keys {tuple(keys.shape)} and values "
            f"{tuple(values.shape)}",
            hint="keys are [B, G, S, K] and values [B, G, S, V], where G divides the number of query heads of size K",
        )
    if key_positions.shape != (batch, slots) or query_positions.shape != (batch, tokens):
        raise EffpassError(
            f"effpass: {tokens} tokens and keys {tuple(keys.shape)} have key_positions {tuple(key_positions.shape)} "
            f"and query_positions {tuple(query_positions.shape)}",
            hint="key_positions are [B, S] and query_positions [B, T]",
        )


@cached_attention.register_fake
def _(query, keys, values, key_positions, query_positions, filled, scale, window, softcap):  # type: ignore[no-untyped-def]
    batch, heads, tokens, key_size = query.shape
    _check(heads, tokens, key_size, keys, values, key_positions, query_positions)
    return query.new_empty((batch, tokens, heads, values.shape[-1]))


differentiate_by_reference(cached_attention, _cached_attention)


@register_flop_formula(torch.ops.effpass.cached_attention)
def _(query: Any, keys: Any, values: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> Any:
    batch, heads, tokens, key_size = query
    return 2 * batch * heads * tokens * keys[2] * (key_size + values[3])


# -- rope_cached_attention --------------------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of the first R features of `x`, halves against each other.

    Args:
        x: [B, T, H, K].
        cos: [B, T, R] or [1, T, R].
        sin: likewise.
    """
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    turned = rotated * cos[:, :, None] + torch.cat((-second, first), dim=-1) * sin[:, :, None]
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


@torch.library.custom_op(
    "effpass::rope_cached_attention",
    mutates_args=("keys", "values"),
    schema="(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor? query_norm, Tensor? key_norm, "
    "float norm_eps, float norm_offset, Tensor(a!) keys, Tensor(b!) values, Tensor key_positions, "
    "Tensor query_positions, Tensor start, float scale, int window, float softcap) -> Tensor",
)
def rope_cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    keys: Tensor,
    values: Tensor,
    key_positions: Tensor,
    query_positions: Tensor,
    start: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """All of attention between its projections: norm of each head, rotation, cache write, attention.

    Args:
        query: [B, T, H, K], a view of the projection, any strides.
        key: [B, T, G, K], likewise.
        value: [B, T, G, V], likewise.
        cos: [B, T, R] or [1, T, R] with R ≤ K even.
        sin: likewise.
        query_norm: [K] of an RMSNorm of each query head, or None.
        key_norm: [K], likewise for the keys.
        norm_eps: of the norms.
        norm_offset: added to the norms' weights (1 in Gemma).
        keys: [B, G, S, K]; slots start ... start + T - 1 are written.
        values: [B, G, S, V], likewise.
        key_positions: int32 [B, S], this call's tokens included; -1 in empty slots and padding.
        query_positions: int32 [B, T]; -1 for padding.
        start: int32 [1], the slot of the first of the new tokens; the slots behind the last of them are empty.
        scale: factor on the scores.
        window: how many positions a query sees, its own included; 0 for all before it.
        softcap: bound on the scores; 0 for none.

    Returns:
        [B, T, H, V], contiguous.

    Raises:
        EffpassError: as `cached_attention` and `cache_write`.
    """
    _check(query.shape[2], query.shape[1], query.shape[3], keys, values, key_positions, query_positions)
    kernels = triton_kernels("decode_attention") if query.is_cuda else None
    if kernels and kernels.supported(query.transpose(1, 2), keys, values):
        return kernels.rope_cached_attention(
            query, key, value, cos, sin, query_norm, key_norm, norm_eps, norm_offset, keys, values, key_positions,
            query_positions, start, scale, window, softcap,
        )  # fmt: skip
    rotated, new_keys = _normed_and_rotated(query, key, cos, sin, query_norm, key_norm, norm_eps, norm_offset)
    _write(keys, values, new_keys.transpose(1, 2), value.transpose(1, 2), start)
    filled = start + query.shape[1]
    return _attend(
        rotated.transpose(1, 2), keys, values, key_positions, query_positions, filled, scale, window, softcap
    )


def _normed_and_rotated(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    norm_eps: float,
    norm_offset: float,
) -> tuple[Tensor, Tensor]:
    if query_norm is not None:
        query = rms_norm(query, query_norm, norm_eps, norm_offset)
    if key_norm is not None:
        key = rms_norm(key, key_norm, norm_eps, norm_offset)
    return rotate(query, cos, sin), rotate(key, cos, sin)


@rope_cached_attention.register_fake
def _(query, key, value, cos, sin, query_norm, key_norm, norm_eps, norm_offset, keys, values, key_positions,  # type: ignore[no-untyped-def]
      query_positions, start, scale, window, softcap):  # fmt: skip
    batch, tokens, heads, key_size = query.shape
    _check(heads, tokens, key_size, keys, values, key_positions, query_positions)
    return query.new_empty((batch, tokens, heads, values.shape[-1]))


@register_flop_formula(torch.ops.effpass.rope_cached_attention)
def _(query: Any, key: Any, value: Any, cos: Any, sin: Any, query_norm: Any, key_norm: Any, norm_eps: Any,
      norm_offset: Any, keys: Any, values: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> Any:  # fmt: skip
    batch, tokens, heads, key_size = query
    return 2 * batch * tokens * heads * keys[2] * (key_size + values[3])
