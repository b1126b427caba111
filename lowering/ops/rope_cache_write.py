"""Per-head norms, rotary embedding and cache write: everything between the projections and the attention itself.

    q = rotate(n_q(query));  keys[start:], values[start:] = rotate(n_k(key)), value

n_q and n_k are optional RMSNorms of each head. :func:`~effpass.lowering.ops.cached_attention.rope_cached_attention`
computes attention in the same kernel launch; this operator precedes attention of other kinds. Shapes are those of that
module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.lowering.ops.cached_attention import TOLERANCE, _normed_and_rotated, _write
from effpass.lowering.ops.kernel_choice import triton_kernels

__all__ = ["TOLERANCE", "has_kernel", "rope_cache_write"]


def has_kernel(device: torch.device, dtype: torch.dtype, rows: int) -> bool:
    """Whether a GPU kernel supports a dtype, for any number of tokens; for other head sizes the reference runs."""
    is_known = dtype in (torch.bfloat16, torch.float16, torch.float32)
    return device.type == "cuda" and is_known and triton_kernels("rope_cache_write") is not None


@torch.library.custom_op(
    "effpass::rope_cache_write",
    mutates_args=("keys", "values"),
    schema="(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor? query_norm, Tensor? key_norm, "
    "float norm_eps, float norm_offset, Tensor(a!) keys, Tensor(b!) values, Tensor start) -> Tensor",
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
    """Rotate queries and keys, and write keys and values to the cache.

    The arguments are those of `effpass::rope_cached_attention`.

    Returns:
        The rotated query [B, H, T, K], contiguous.

    Raises:
        EffpassError: in the cases of `effpass::cache_write`.
    """
    kernels = triton_kernels("rope_cache_write") if query.is_cuda else None
    if kernels and kernels.supported(query, keys, values):
        return kernels.rope_cache_write(
            query, key, value, cos, sin, query_norm, key_norm, norm_eps, norm_offset, keys, values, start
        )
    rotated, new_keys = _normed_and_rotated(query, key, cos, sin, query_norm, key_norm, norm_eps, norm_offset)
    _write(keys, values, new_keys.transpose(1, 2), value.transpose(1, 2), start)
    return rotated.transpose(1, 2).contiguous()


@rope_cache_write.register_fake
def _(query, *args):  # type: ignore[no-untyped-def]
    batch, tokens, heads, size = query.shape
    return query.new_empty((batch, heads, tokens, size))


@register_flop_formula(torch.ops.effpass.rope_cache_write)
def _(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 0
