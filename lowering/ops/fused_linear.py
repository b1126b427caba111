"""Matrix products of few tokens, fused with the RMSNorm, bias, activation or residual around them.

    fused_linear:  yᵢ = Wᵢ n(x) + bᵢ (+ residual)        y = act(W_gate n(x)) · W_up n(x)  :gated_linear
    n(x) = x / √(mean(x²) + ε) · (offset + norm_weight)  with a norm weight, else x

The pass `fuse_linears` replaces the products of a decoder layer with these operators. RMSNorm:
https://arxiv.org/abs/1910.07467; gated products: https://arxiv.org/abs/2002.05202. Rounding follows transformers:
statistics are computed in float32; without an offset the normalized value is cast to x's dtype before the weight is
applied (Llama), with an offset the product is cast (Gemma).

Shapes: D hidden size, F output size of a product. A GPU kernel for up to 64 tokens is in
:mod:`effpass.lowering.kernels.small_linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.core.errors import EffpassError, did_you_mean
from effpass.lowering.ops.kernel_choice import triton_kernels
from effpass.lowering.ops.recomputed import differentiate_by_reference

__all__ = ["ACTIVATIONS", "TOLERANCE", "fused_linear", "gated_linear", "has_kernel", "rms_norm"]

#: Maximum deviation of a kernel's output from the reference, relative to the largest value of the output. The kernel
#: keeps float32 between norm, product, activation and residual, where the reference rounds to x's dtype four times, and
#: it sums in another order. It applies the norm's weight before the product, rounded to x's dtype, and the statistics
#: after the product.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-6}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Apply RMSNorm over the last dimension of `x` with weight `offset` + `weight`, rounded as in transformers."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (wide * (offset + weight.to(torch.float32))).to(x.dtype)
    return (weight * wide.to(x.dtype)).to(x.dtype)


def has_kernel(device: torch.device, dtype: torch.dtype, rows: int) -> bool:
    """Whether a GPU kernel supports `rows` tokens of a dtype; for other hidden sizes the reference runs instead."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    kernels = triton_kernels("small_linear")
    return kernels is not None and rows <= kernels.MOST_ROWS


# -- fused_linear -----------------------------------------------------------------------------------------------------


def _fused_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm_weight: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    residual: Tensor | None,
) -> list[Tensor]:
    normal = x if norm_weight is None else rms_norm(x, norm_weight, norm_eps, norm_offset)
    products = [F.linear(normal, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return products if residual is None else [residual + products[0]]


@torch.library.custom_op(
    "effpass::fused_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? norm_weight, float norm_eps, float norm_offset, "
    "Tensor? residual) -> Tensor[]",
)
def fused_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm_weight: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    residual: Tensor | None,
) -> list[Tensor]:
    """Multiply a normalized input with several weights, in one kernel launch if a kernel supports them.

    Args:
        x: [..., D].
        weights: weights, [F, D] each; F may differ.
        biases: bias [F] or None for each weight.
        norm_weight: [D], weight of an RMSNorm before the product; None for no norm.
        norm_eps: epsilon of the norm.
        norm_offset: number added to `norm_weight` (1 in Gemma).
        residual: [..., F], added to the product; requires a single weight. None for no residual.

    Returns:
        One product [..., F] for each weight.

    Raises:
        EffpassError: if the numbers of weights and biases differ, a weight is not [F, D], or there are a residual and
            several weights.
    """
    _check(x, weights, biases, residual)
    return _fused_linear(x, weights, biases, norm_weight, norm_eps, norm_offset, residual)


def _check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], residual: Tensor | None) -> None:
    if not weights or len(weights) != len(biases):
        raise EffpassError(
            f"effpass::fused_linear got {len(weights)} weights and {len(biases)} biases",
            hint="give at least one weight, and for each weight its bias or None",
        )
    for weight in weights:
        if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
            raise EffpassError(
                f"effpass::fused_linear: x is {tuple(x.shape)}, and a weight is {tuple(weight.shape)}",
                hint="a weight is [F, D] where x is [..., D]",
            )
    if residual is not None and len(weights) > 1:
        raise EffpassError(
            f"effpass::fused_linear got a residual and {len(weights)} weights",
            hint="a residual is added to the product of one weight",
        )


@fused_linear.register_fake
def _(x, weights, biases, norm_weight, norm_eps, norm_offset, residual):  # type: ignore[no-untyped-def]
    _check(x, weights, biases, residual)
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


@fused_linear.register_kernel("cuda")
def _(x, weights, biases, norm_weight, norm_eps, norm_offset, residual):  # type: ignore[no-untyped-def]
    _check(x, weights, biases, residual)
    x, norm_weight = _within_range(x, norm_weight, norm_eps, norm_offset)
    kernels = triton_kernels("small_linear")
    if kernels and kernels.supported(x, weights, biases, residual):
        return kernels.fused_linear(x, weights, biases, norm_weight, norm_eps, norm_offset, residual)
    return _fused_linear(x, weights, biases, norm_weight, norm_eps, norm_offset, residual)


def _within_range(
    x: Tensor, norm_weight: Tensor | None, norm_eps: float, norm_offset: float
) -> tuple[Tensor, Tensor | None]:
    """Apply the norm outside of the kernel if x · weight may leave the dtype's range.

    The kernel for several tokens rounds x · weight to x's dtype before it applies the statistics, which float16 may not
    hold.
    """
    if norm_weight is None or x.dtype != torch.float16 or x.numel() == x.shape[-1]:
        return x, norm_weight
    return rms_norm(x, norm_weight, norm_eps, norm_offset), None


differentiate_by_reference(fused_linear, _fused_linear)


@register_flop_formula(torch.ops.effpass.fused_linear)
def _(x_shape: Any, weights: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> Any:
    return 2 * _numel(x_shape) * sum(weight[0] for weight in weights)


# -- gated_linear -----------------------------------------------------------------------------------------------------


def _gated_linear(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    activation: str,
) -> Tensor:
    normal = x if norm_weight is None else rms_norm(x, norm_weight, norm_eps, norm_offset)
    return ACTIVATIONS[activation](F.linear(normal, gate)) * F.linear(normal, up)


@torch.library.custom_op(
    "effpass::gated_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor gate, Tensor up, Tensor? norm_weight, float norm_eps, float norm_offset, "
    "str activation) -> Tensor",
)
def gated_linear(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    activation: str,
) -> Tensor:
    """The first half of a gated feed-forward layer.

    Args:
        x: [..., D].
        gate: [F, D], W_gate.
        up: [F, D], W_up.
        norm_weight: [D], weight of an RMSNorm before the products; None for no norm.
        norm_eps: epsilon of the norm.
        norm_offset: number added to `norm_weight` (1 in Gemma).
        activation: a key of :data:`ACTIVATIONS`.

    Returns:
        [..., F].

    Raises:
        EffpassError: if the activation is unknown, or gate and up are not both [F, D].
    """
    _check_gated(x, gate, up, activation)
    return _gated_linear(x, gate, up, norm_weight, norm_eps, norm_offset, activation)


def _check_gated(x: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise EffpassError(f"effpass::gated_linear: activation {activation!r}" + did_you_mean(activation, ACTIVATIONS))
    if gate.dim() != 2 or gate.shape != up.shape or gate.shape[1] != x.shape[-1]:
        raise EffpassError(
            f"effpass::gated_linear: x is {tuple(x.shape)}, gate {tuple(gate.shape)} and up {tuple(up.shape)}",
            hint="gate and up are both [F, D] where x is [..., D]",
        )


@gated_linear.register_fake
def _(x, gate, up, norm_weight, norm_eps, norm_offset, activation):  # type: ignore[no-untyped-def]
    _check_gated(x, gate, up, activation)
    return x.new_empty((*x.shape[:-1], gate.shape[0]))


@gated_linear.register_kernel("cuda")
def _(x, gate, up, norm_weight, norm_eps, norm_offset, activation):  # type: ignore[no-untyped-def]
    _check_gated(x, gate, up, activation)
    x, norm_weight = _within_range(x, norm_weight, norm_eps, norm_offset)
    kernels = triton_kernels("small_linear")
    if kernels and kernels.supported(x, [gate, up], [None, None], None):
        return kernels.gated_linear(x, gate, up, norm_weight, norm_eps, norm_offset, activation)
    return _gated_linear(x, gate, up, norm_weight, norm_eps, norm_offset, activation)


differentiate_by_reference(gated_linear, _gated_linear)


@register_flop_formula(torch.ops.effpass.gated_linear)
def _(x_shape: Any, gate: Any, up: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> Any:
    return 2 * _numel(x_shape) * (gate[0] + up[0])


def _numel(shape: Any) -> Any:
    product = 1
    for size in shape:
        product = product * size
    return product
