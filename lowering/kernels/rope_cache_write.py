"""Triton kernel of `effpass::rope_cache_write`: norm per head, rotation and cache write in one launch.

    q = rotate(n_q(query));  keys[start:], values[start:] = rotate(n_k(key)), value

One program of one warp handles one head of the queries, keys or values of one token. Norm and rotation are computed in
float32 and rounded to the dtype of the result. Tokens past the last slot are not written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.decode_attention import _last_contiguous, _rotated, _scales
from effpass.lowering.kernels.launch import launch_options, overlaps

__all__ = ["rope_cache_write", "supported"]


def supported(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Return whether the kernel supports `query` [B, T, H, K]: head sizes up to 256, one dtype."""
    return (
        query.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and keys.dtype == values.dtype == query.dtype
        and max(query.shape[-1], values.shape[-1]) <= 256
        and keys.stride(-1) == values.stride(-1) == 1
        and query.numel() > 0
    )


def rope_cache_write(
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
    start: Tensor,
) -> Tensor:
    """Run `effpass::rope_cache_write` on tensors that are :func:`supported`."""
    (batch, tokens, heads, key_size), (_, groups, slots, value_size) = query.shape, values.shape
    query, key, value = (_last_contiguous(x) for x in (query, key, value))
    cos, sin = cos.contiguous(), sin.contiguous()
    out = query.new_empty((batch, heads, tokens, key_size))
    _write[(heads + 2 * groups, batch * tokens)](
        query, key, value, cos, sin, query_norm, key_norm, keys, values, start, out, *query.stride()[:3],
        *key.stride()[:3], *value.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        0 if cos.shape[0] == 1 else cos.stride(0), tokens, slots, norm_eps, norm_offset, HEADS=heads, GROUPS=groups,
        KEY=key_size, VALUE=value_size, ROTATED=cos.shape[-1], PDL=overlaps(query.device),
        BLOCK=max(16, triton.next_power_of_2(max(key_size, value_size))), **launch_options(query.device, 1),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens"])
def _write(
    query, key, value, cos, sin, query_norm, key_norm, keys, values, start, out, query_b, query_t, query_h, key_b,
    key_t, key_h, value_b, value_t, value_h, keys_b, keys_h, keys_s, values_b, values_h, values_s, angles_b, tokens,
    slots, eps, offset, HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    ROTATED: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1)
    b, t = (row // tokens).to(tl.int64), row % tokens
    one, d = tl.arange(0, 1), tl.arange(0, BLOCK)
    inside = one == 0
    of_angles = one + b * angles_b + t * ROTATED
    query_scales = _scales(query_norm, KEY, BLOCK, ROTATED)
    key_scales = _scales(key_norm, KEY, BLOCK, ROTATED)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    place = (tl.load(start) + t).to(tl.int64)
    if head < HEADS:
        q = _rotated(
            query, one + b * query_b + t * query_t + head * query_h, inside, query_scales[0], query_scales[1], cos, sin,
            of_angles, eps, offset, query_norm is not None, KEY, BLOCK, ROTATED,
        )  # fmt: skip
        at = ((b * HEADS + head) * tokens + t) * KEY
        tl.store(out + at + one[:, None] + d[None, :], q.to(out.dtype.element_ty), mask=(d < KEY)[None, :])
    elif head < HEADS + GROUPS:
        group = head - HEADS
        k = _rotated(
            key, one + b * key_b + t * key_t + group * key_h, inside, key_scales[0], key_scales[1], cos, sin, of_angles,
            eps, offset, key_norm is not None, KEY, BLOCK, ROTATED,
        )  # fmt: skip
        at = b * keys_b + group * keys_h + place * keys_s
        mask = (d < KEY)[None, :] & (place < slots)
        tl.store(keys + at + one[:, None] + d[None, :], k.to(keys.dtype.element_ty), mask=mask)
    else:
        group = head - HEADS - GROUPS
        v = tl.load(value + b * value_b + t * value_t + group * value_h + d, mask=d < VALUE, other=0)
        at = b * values_b + group * values_h + place * values_s
        tl.store(values + at + d, v.to(values.dtype.element_ty), mask=(d < VALUE) & (place < slots))
