"""Attention over a KV cache of fixed size whose slots record the positions of their tokens, and writes to that cache.

    out[t] = Σ_s softmax_s(c(scale · q_t · k_s)) v_s      over slots s visible to t;  c(x) = softcap · tanh(x / softcap)
    s is visible to t  ⇔  0 ≤ p_s ≤ p_t  and  (window = 0 or p_t − p_s < window)

A slot is the place of one token in the cache, and p is the position of a token in its sequence; -1 marks empty slots
and padding. c is the identity if softcap is 0. A query without a visible slot outputs 0. Since the mask is computed
from stored positions, slots may be in any order and sequences may differ in length: the cache supports padding on
either side, evicted slots and rolling windows. Every slot must hold finite numbers (a new cache is zeros), because a
masked slot has weight 0 and 0 · NaN is NaN.

`cache_write` and `rope_cached_attention` write `keys` and `values` in place and have no gradients; `cached_attention`
only reads and is differentiable. GPU kernels are in :mod:`effpass.lowering.kernels.decode_attention` (few tokens),
:mod:`effpass.lowering.kernels.prefill_attention` (many tokens) and :mod:`effpass.lowering.kernels.latent_attention`
(one token over latents, where `values` is a view of the first V channels of `keys`).

Shapes: B batch, T new tokens, S slots, H query heads, G KV heads, K key size, V value size, R rotated features.
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

#: Maximum deviation of a kernel's output from the reference, relative to the largest value of the output. Both compute
#: scores and sums in float32. The kernels round softmax weights to the cache's dtype before the second product, and in
#: `rope_cached_attention` they keep float32 between norm and rotation.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float64: 1e-6}


def has_kernel(device: torch.device, dtype: torch.dtype, rows: int) -> bool:
    """Whether a GPU kernel supports `rows` tokens of a dtype; for unsupported head sizes the reference runs instead."""
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
        start: int32 [1], slot of the first token.

    Raises:
        EffpassError: on the CPU, if the tokens don't fit into the slots. On a GPU the check would have to wait for
            `start`, so the caller must ensure that they fit.
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
    """Attention of T tokens over the cache. Query heads share the keys of their KV head without copying them.

    Args:
        query: [B, H, T, K], any strides.
        keys: [B, G, S, K], any strides with the last dimension contiguous.
        values: [B, G, S, V], any strides with the last dimension contiguous.
        key_positions: int32 [B, S]; -1 in empty slots and padding.
        query_positions: int32 [B, T]; -1 for padding.
        filled: int32 [1], number of slots in use; slots from there on are empty and are not read.
        scale: factor applied to the scores.
        window: number of positions that a query sees, including its own; 0 for no limit.
        softcap: bound on the scores; 0 for none.

    Returns:
        [B, T, H, V], contiguous.

    Raises:
        EffpassError: if H is not a multiple of G, or sizes don't match.
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
    end = min(max(int(filled), 0), keys.shape[2])  # without empty slots, which may be most of a large cache
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
    """Apply rotary position embedding to the first R features of `x`, pairing feature i with feature i + R / 2.

    Args:
        x: [B, T, H, K].
        cos: [B, T, R] or [1, T, R].
        sin: [B, T, R] or [1, T, R].
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
    """Everything between the projections of an attention layer: per-head norms, rotation, cache write and attention.

    Args:
        query: [B, T, H, K], a view of the projection's output, any strides.
        key: [B, T, G, K], any strides.
        value: [B, T, G, V], any strides.
        cos: [B, T, R] or [1, T, R] with R ≤ K even.
        sin: [B, T, R] or [1, T, R].
        query_norm: [K], weight of an RMSNorm of each query head; None for no norm.
        key_norm: [K], weight of an RMSNorm of each key head; None for no norm.
        norm_eps: epsilon of the norms.
        norm_offset: number added to the weights of the norms (1 in Gemma).
        keys: [B, G, S, K]; slots start ... start + T - 1 are written.
        values: [B, G, S, V]; the same slots are written.
        key_positions: int32 [B, S], including the new tokens; -1 in empty slots and padding.
        query_positions: int32 [B, T]; -1 for padding.
        start: int32 [1], slot of the first new token; the slots after the last new token are empty.
        scale: factor applied to the scores.
        window: number of positions that a query sees, including its own; 0 for no limit.
        softcap: bound on the scores; 0 for none.

    Returns:
        [B, T, H, V], contiguous.

    Raises:
        EffpassError: in the cases of `cached_attention` and `cache_write`.
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
