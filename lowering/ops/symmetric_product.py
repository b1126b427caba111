"""Batched matrix products with a symmetric result, and the choice of their Triton kernel.

    C_i = α · A_i B_iᵀ + β · D_i + γ · I        A, B [B, M, K];  C, D [B, M, M] symmetric

The caller guarantees symmetry: B = A, or A and B are polynomials of the same symmetric matrix. Computing half of the
tiles is then sufficient. With ``tall=True``, A and B are [B, K, M] and the product is A_iᵀ B_i. The Newton-Schulz
iteration of MONA (:mod:`effpass.trainers.mona.newton_schulz`) consists of such products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["has_kernel", "reference", "symmetric_product"]

# The smallest M for which half of the tiles is faster than cuBLAS's full product; below it, launch time dominates.
SMALLEST = 1024


def symmetric_product(
    a: Tensor,
    b: Tensor,
    d: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 0.0,
    tall: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute C of the equation above, with the Triton kernel if it supports the product.

    Args:
        a: [B, M, K], or [B, K, M] if `tall`.
        b: same shape as `a`; the product must be symmetric.
        d: [B, M, M]; required if ``beta != 0``.
        alpha: factor α of the product.
        beta: factor β of `d`.
        gamma: factor γ of the identity.
        tall: whether `a` and `b` are [B, K, M].
        dtype: dtype of the result; that of `a` by default.
    """
    dtype = a.dtype if dtype is None else dtype
    if has_kernel(a, tall):
        if torch.compiler.is_compiling():
            return torch.ops.effpass.symmetric_product(a, b, d, alpha, beta, gamma, tall, dtype)
        from effpass.lowering.kernels.newton_schulz import launch

        return launch(a, b, d, alpha, beta, gamma, tall, dtype)
    return reference(a, b, d, alpha, beta, gamma, tall, dtype)


def reference(
    a: Tensor,
    b: Tensor,
    d: Tensor | None,
    alpha: float,
    beta: float,
    gamma: float,
    tall: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Reference implementation with torch's batched products, which also is the fallback on every device."""
    left, right = (a.mT, b) if tall else (a, b.mT)
    if d is None or beta == 0.0:
        c = torch.bmm(left, right)
        c = c if alpha == 1.0 else c.mul_(alpha)
    else:
        c = torch.baddbmm(d.to(a.dtype), left, right, beta=beta, alpha=alpha)
    if gamma:
        c.diagonal(dim1=-2, dim2=-1).add_(gamma)
    return c.to(dtype)


def has_kernel(a: Tensor, tall: bool) -> bool:
    """Whether the Triton kernel is used for a product: Hopper, half precision, large M, rows of whole 16 bytes."""
    m, k = (a.shape[-1], a.shape[-2]) if tall else (a.shape[-2], a.shape[-1])
    return (
        a.is_cuda
        and a.dtype in (torch.float16, torch.bfloat16)
        and m >= SMALLEST
        and m % 8 == 0
        and k % 8 == 0
        and torch.cuda.get_device_capability(a.device)[0] == 9
    )


@torch.library.custom_op("effpass::symmetric_product", mutates_args=())
def _operator(
    a: Tensor,
    b: Tensor,
    d: Tensor | None,
    alpha: float,
    beta: float,
    gamma: float,
    tall: bool,
    dtype: torch.dtype,
) -> Tensor:
    if has_kernel(a, tall):
        from effpass.lowering.kernels.newton_schulz import launch

        return launch(a, b, d, alpha, beta, gamma, tall, dtype)
    return reference(a, b, d, alpha, beta, gamma, tall, dtype).clone()


@_operator.register_fake
def _fake(
    a: Tensor,
    b: Tensor,
    d: Tensor | None,
    alpha: float,
    beta: float,
    gamma: float,
    tall: bool,
    dtype: torch.dtype,
) -> Tensor:
    m = a.shape[-1] if tall else a.shape[-2]
    return a.new_empty((a.shape[0], m, m), dtype=dtype)


@register_flop_formula(torch.ops.effpass.symmetric_product)
def _(a: Any, b: Any, d: Any, alpha: Any, beta: Any, gamma: Any, tall: bool, *args: Any, **kwargs: Any) -> Any:
    """Count the whole product, of which the kernel computes half of the tiles."""
    batch, m, k = (a[0], a[2], a[1]) if tall else a
    return 2 * batch * m * m * k
