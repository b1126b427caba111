"""Triton kernels for the element-wise part of the MONA optimizer, over many matrices of one shape at any addresses.

    advance:     a ← a + (1 − β)(g − a)    g̃ = g + gain (g − a)    m ← μ m + (1 − μ) g̃    x = m, or (1 − μ) g̃ + μ m
    normalize:   y = x / max(‖x‖, eps)
    apply:       W ← (1 − η λ) W − η · scale · O
    finite:      whether all gradients g are finite

In `advance`, g̃ uses a as it was before the update, and the second form of x is Nesterov's look-ahead. O is the
orthogonalized y. `effpass.trainers.mona.update` and `effpass.trainers.mona.batches` define the algorithm.

A table int64 [4, N] on the device holds the addresses of gradients, momenta m, accelerations a and parameters W of N
matrices. Each function is one launch over all matrices, with one program per 4096 elements; `advance` also reduces its
partial squared norms. Arithmetic is in float32, and results are rounded to the dtype of each buffer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["advance", "apply", "finite", "normalize"]

BLOCK = 4096

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def advance(
    table: Tensor,
    out: Tensor,
    grad_dtype: torch.dtype,
    momentum_dtype: torch.dtype,
    acceleration_dtype: torch.dtype | None,
    *,
    momentum: float,
    beta: float,
    gain: float,
    nesterov: bool,
    finite: Tensor | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Update momenta and accelerations, and write the matrices to orthogonalize.

    Args:
        table: int64 [4, N], addresses of contiguous tensors that are aligned to 16 bytes.
        out: [N, M, N'], matrices x; written.
        grad_dtype: dtype of the gradients.
        momentum_dtype: dtype of the momenta.
        acceleration_dtype: dtype of the accelerations; None if α is 0, so that they are neither read nor written.
        momentum: decay μ of the momenta.
        beta: decay β_a of the accelerations.
        gain: α(1 − β_a).
        nesterov: whether to write (1 − μ) g̃ + μ m instead of m.
        finite: bool on the device; if false, momenta and accelerations are not written. None to write them always.
        block: elements per program.

    Returns:
        float32 [N], squared Frobenius norm of each matrix of `out`, as rounded.
    """
    count, size = out.shape[0], out[0].numel()
    blocks = triton.cdiv(size, block)
    partial = torch.empty((count, blocks), dtype=torch.float32, device=out.device)
    _advance[(blocks, count)](
        table, out, partial, partial if finite is None else finite, count, size,
        1.0 - momentum, momentum, 1.0 - beta, gain,
        GRAD=_TYPES[grad_dtype], MOMENTUM=_TYPES[momentum_dtype],
        ACCELERATION=_TYPES[acceleration_dtype or momentum_dtype], ACCELERATED=acceleration_dtype is not None,
        NESTEROV=nesterov, GUARDED=finite is not None, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return partial.sum(dim=1)


def apply(
    table: Tensor,
    update: Tensor,
    dtype: torch.dtype,
    lr: Tensor,
    *,
    scale: float,
    weight_decay: float,
    cautious: bool,
    finite: Tensor | None = None,
    block: int = BLOCK,
) -> None:
    """Update the parameters: W ← (1 − ηλ) W − η · scale · O.

    Args:
        table: int64 [4, N], addresses, of which those of the parameters are used.
        update: [N, M, N'], orthogonalized matrices O.
        dtype: dtype of the parameters.
        lr: learning rate η, one float32 on the device, so that a captured graph follows a schedule.
        scale: factor on the update.
        weight_decay: λ.
        cautious: whether to decay only elements in which W and O have the same sign.
        finite: bool on the device; if false, nothing is written. None to write always.
        block: elements per program.
    """
    count, size = update.shape[0], update[0].numel()
    _apply[(triton.cdiv(size, block), count)](
        table, update, lr, lr if finite is None else finite, count, size, float(scale), float(weight_decay),
        PARAMETER=_TYPES[dtype], CAUTIOUS=cautious, GUARDED=finite is not None, BLOCK=block, num_warps=8,
    )  # fmt: skip


def finite(table: Tensor, grad_dtype: torch.dtype, size: int, flag: Tensor, *, block: int = BLOCK) -> None:
    """Set `flag`, a bool on the device, to false if any gradient, of `size` elements each, is not finite."""
    count = table.shape[1]
    _finite[(triton.cdiv(size, block), count)](
        table, flag, count, size, GRAD=_TYPES[grad_dtype], BLOCK=block, num_warps=8
    )


def normalize(x: Tensor, squared_norm: Tensor, out: Tensor, eps: float, *, block: int = BLOCK) -> None:
    """Compute out_i = x_i / max(‖x_i‖, eps), for `x` and `out` [N, M, N'] and `squared_norm` float32 [N]."""
    size = x[0].numel()
    _normalize[(triton.cdiv(size, block), x.shape[0])](x, squared_norm, out, size, float(eps), BLOCK=block, num_warps=8)


@triton.jit
def _finite(table, flag, count, size, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    grads = tl.multiple_of(tl.load(table + tl.program_id(1)).to(tl.pointer_type(GRAD)), 16)
    g = tl.load(grads + at, mask=at < size, other=0.0).to(tl.float32)
    bad = tl.sum((g - g != 0).to(tl.int32))  # ∞ − ∞ and NaN − NaN are NaN
    tl.store(flag, 0, mask=bad > 0)


@triton.jit
def _normalize(x, squared_norm, out, size, eps, BLOCK: tl.constexpr):
    matrix = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.load(squared_norm + matrix)), eps)
    value = tl.load(x + matrix * size + at, mask=inside, other=0.0).to(tl.float32) * inverse
    tl.store(out + matrix * size + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _advance(
    table,
    out,
    partial,
    finite,
    count,
    size,
    weight,
    momentum,
    acceleration_weight,
    gain,
    GRAD: tl.constexpr,
    MOMENTUM: tl.constexpr,
    ACCELERATION: tl.constexpr,
    ACCELERATED: tl.constexpr,
    NESTEROV: tl.constexpr,
    GUARDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    kept = inside
    if GUARDED:
        kept = inside & (tl.load(finite).to(tl.int32) != 0)
    grads = tl.multiple_of(tl.load(table + matrix).to(tl.pointer_type(GRAD)), 16)
    momenta = tl.multiple_of(tl.load(table + count + matrix).to(tl.pointer_type(MOMENTUM)), 16)
    g = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(momenta + at, mask=inside, other=0.0).to(tl.float32)
    if ACCELERATED:
        accelerations = tl.multiple_of(tl.load(table + 2 * count + matrix).to(tl.pointer_type(ACCELERATION)), 16)
        a = tl.load(accelerations + at, mask=inside, other=0.0).to(tl.float32)
        difference = g - a
        tl.store(accelerations + at, (a + acceleration_weight * difference).to(ACCELERATION), mask=kept)
        g += gain * difference
    m += weight * (g - m)
    tl.store(momenta + at, m.to(MOMENTUM), mask=kept)
    if NESTEROV:
        m = g + momentum * (m - g)
    x = m.to(out.dtype.element_ty)
    tl.store(out + matrix * size + at, x, mask=inside)
    x = x.to(tl.float32)
    tl.store(partial + matrix * tl.num_programs(0) + tl.program_id(0), tl.sum(x * x))


@triton.jit
def _apply(
    table,
    update,
    lr,
    finite,
    count,
    size,
    scale,
    weight_decay,
    PARAMETER: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    GUARDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    kept = inside
    if GUARDED:
        kept = inside & (tl.load(finite).to(tl.int32) != 0)
    rate = tl.load(lr).to(tl.float32)
    parameters = tl.multiple_of(tl.load(table + 3 * count + matrix).to(tl.pointer_type(PARAMETER)), 16)
    p = tl.load(parameters + at, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(update + matrix * size + at, mask=inside, other=0.0).to(tl.float32)
    decay = rate * weight_decay
    if CAUTIOUS:
        p -= tl.where(p * o > 0, decay * p, 0.0)
    else:
        p -= decay * p
    tl.store(parameters + at, (p - rate * scale * o).to(PARAMETER), mask=kept)
