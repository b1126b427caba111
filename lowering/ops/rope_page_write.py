"""Per-head norms, rotary embedding and cache write of a decode step, for a cache in host memory.

    q = rotate(n_q(query));  rotate(n_k(key)), value → host memory, and the page of the token's block if it has one

The operator is the counterpart of :mod:`effpass.lowering.ops.rope_cache_write` for the caches of
:mod:`effpass.lowering.ops.block_pool`, where pages are defined.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.lowering.ops.block_pool import write_token
from effpass.lowering.ops.cached_attention import TOLERANCE, _normed_and_rotated
from effpass.lowering.ops.kernel_choice import triton_kernels

__all__ = ["TOLERANCE", "rope_page_write"]


@torch.library.custom_op(
    "effpass::rope_page_write",
    mutates_args=("host", "pages"),
    schema="(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor? query_norm, Tensor? key_norm, "
    "float norm_eps, float norm_offset, Tensor start, Tensor(a!) host, Tensor(b!) pages, Tensor block_table) -> Tensor",
)
def rope_page_write(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, query_norm: Tensor | None,
    key_norm: Tensor | None, norm_eps: float, norm_offset: float, start: Tensor, host: Tensor, pages: Tensor,
    block_table: Tensor,
) -> Tensor:  # fmt: skip
    """Rotate the query and key of one token, and write its key and value to the host and to its page.

    The arguments up to `norm_offset` are those of `effpass::rope_cached_attention`, the others those of
    `effpass::page_write`.

    Returns:
        The rotated query [B, H, 1, K], contiguous.

    Raises:
        EffpassError: in the cases of `effpass::page_write`.
    """
    kernels = triton_kernels("rope_page_write") if query.is_cuda else None
    if kernels and kernels.supported(query, value, host):
        return kernels.rope_page_write(
            query, key, value, cos, sin, query_norm, key_norm, norm_eps, norm_offset, start, host, pages, block_table
        )
    rotated, new_keys = _normed_and_rotated(query, key, cos, sin, query_norm, key_norm, norm_eps, norm_offset)
    write_token(new_keys.transpose(1, 2), value.transpose(1, 2), start, host, pages, block_table)
    return rotated.transpose(1, 2).contiguous()


@rope_page_write.register_fake
def _(query, *args):  # type: ignore[no-untyped-def]
    batch, tokens, heads, size = query.shape
    return query.new_empty((batch, heads, tokens, size))


@register_flop_formula(torch.ops.effpass.rope_page_write)
def _(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 0
