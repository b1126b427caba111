"""Triton kernel of `effpass::rope_page_write`: norm per head, rotation and the writes of one token in one launch.

    q = rotate(n_q(query))      k = rotate(n_k(key))

The cache lies in host memory, where k and value are written, and also to the page of their block if it has one
(:mod:`effpass.lowering.ops.block_pool`). One program of one warp handles one head of the queries, keys or values of one
sequence. Norm and rotation are computed in float32 and rounded to the dtype of the result. A token past the last slot
is not written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.decode_attention import _last_contiguous, _rotated, _scales
from effpass.lowering.kernels.launch import launch_options, overlaps

__all__ = ["rope_page_write", "supported"]


def supported(query: Tensor, value: Tensor, host: Tensor) -> bool:
    """Return whether the kernel supports `query` [B, 1, H, K]: head sizes up to 256, one dtype, no latents."""
    return (
        query.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and host.dtype == query.dtype
        and query.shape[1] == 1
        and max(query.shape[-1], value.shape[-1]) <= 256
        and host.shape[-1] == query.shape[-1] + value.shape[-1]
        and query.numel() > 0
    )


def rope_page_write(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, query_norm: Tensor | None,
    key_norm: Tensor | None, norm_eps: float, norm_offset: float, start: Tensor, host: Tensor, pages: Tensor,
    block_table: Tensor,
) -> Tensor:  # fmt: skip
    """Run `effpass::rope_page_write` on tensors that are :func:`supported`."""
    (batch, _, heads, key_size), (groups, value_size) = query.shape, value.shape[2:]
    query, key, value = (_last_contiguous(x) for x in (query, key, value))
    cos, sin = cos.contiguous(), sin.contiguous()
    out = query.new_empty((batch, heads, 1, key_size))
    _turn[(heads + 2 * groups, batch)](
        query, key, value, cos, sin, query_norm, key_norm, start, host, pages, block_table, out, query.stride(0),
        query.stride(2), key.stride(0), key.stride(2), value.stride(0), value.stride(2),
        0 if cos.shape[0] == 1 else cos.stride(0), host.shape[2], norm_eps, norm_offset, HEADS=heads, GROUPS=groups,
        KEY=key_size, VALUE=value_size, ROTATED=cos.shape[-1], ROWS=host.shape[3], PDL=overlaps(query.device),
        BLOCK=max(16, triton.next_power_of_2(max(key_size, value_size))), **launch_options(query.device, 1),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["blocks"])
def _turn(
    query, key, value, cos, sin, query_norm, key_norm, start, host, pages, block_table, out, query_b, query_h, key_b,
    key_h, value_b, value_h, angles_b, blocks, eps, offset, HEADS: tl.constexpr, GROUPS: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, ROTATED: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    head, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    one, d = tl.arange(0, 1), tl.arange(0, BLOCK)
    inside = one == 0
    of_angles = one + b * angles_b
    query_scales = _scales(query_norm, KEY, BLOCK, ROTATED)
    key_scales = _scales(key_norm, KEY, BLOCK, ROTATED)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.load(start)
    n, row = slot // ROWS, slot % ROWS
    if head < HEADS:
        q = _rotated(
            query, one + b * query_b + head * query_h, inside, query_scales[0], query_scales[1], cos, sin, of_angles,
            eps, offset, query_norm is not None, KEY, BLOCK, ROTATED,
        )  # fmt: skip
        to = (b * HEADS + head) * KEY + one[:, None] + d[None, :]
        tl.store(out + to, q.to(out.dtype.element_ty), mask=(d < KEY)[None, :])
    else:
        group = (head - HEADS) % GROUPS
        of_head = b * GROUPS + group
        there = n < blocks
        page = tl.load(block_table + of_head * blocks + n, mask=there, other=-1).to(tl.int64)
        far = ((of_head * blocks + n) * ROWS + row) * (KEY + VALUE)
        near = (page * ROWS + row) * (KEY + VALUE)
        if head < HEADS + GROUPS:
            k = _rotated(
                key, one + b * key_b + group * key_h, inside, key_scales[0], key_scales[1], cos, sin, of_angles, eps,
                offset, key_norm is not None, KEY, BLOCK, ROTATED,
            ).to(host.dtype.element_ty)  # fmt: skip
            of_row = one[:, None] + d[None, :]
            tl.store(pages + near + of_row, k, mask=(d < KEY)[None, :] & (page >= 0))
            tl.store(host + far + of_row, k, mask=(d < KEY)[None, :] & there)
        else:
            v = tl.load(value + b * value_b + group * value_h + d, mask=d < VALUE, other=0).to(host.dtype.element_ty)
            tl.store(pages + near + KEY + d, v, mask=(d < VALUE) & (page >= 0))
            tl.store(host + far + KEY + d, v, mask=(d < VALUE) & there)
