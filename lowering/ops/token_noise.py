"""Reproducible exponential noise for sampling, a function of seed, sequence, output column and token.

    token of column c = argmax_i p_i / e_i,   e_i = token_noise(seed, row, c)_i

With exponential e_i, token i is chosen with probability p_i. A column always gets the same noise, whichever speculative
step computes it. Sampled text thus depends on the seed and the model, and not on the tokens that a draft proposed.

The noise is −log(1 − v), where v in (0, 1) consists of 32 bits of SplitMix64 (https://doi.org/10.1145/2714064.2660195)
at counter

    row · 2⁴⁴ + column · 2²⁰ + token

Shapes: B sequences (rows), J columns per sequence, V vocabulary size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.core.errors import EffpassError
from effpass.lowering.ops.kernel_choice import triton_kernels

__all__ = ["MOST_TOKENS", "TOLERANCE", "token_noise"]

MOST_TOKENS = 1 << 20

#: Maximum relative deviation of the kernel from the reference. The kernel's logarithm is a power series up to v = 1/16,
#: and above it is subject to the rounding of 1 − v, 2⁻²⁵ of 1/16.
TOLERANCE = 2e-6

_STEP, _FIRST, _SECOND = (x - (1 << 64) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _token_noise(seed: Tensor, columns: Tensor, vocabulary: int) -> Tensor:
    row = torch.arange(columns.shape[0], device=columns.device)[:, None]
    place = ((row << 44) + (columns << 20))[:, :, None] + torch.arange(vocabulary, device=columns.device)
    z = place.add_(1).mul_(_STEP).add_(seed)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))
    v = (z >> 32).bitwise_and_((1 << 32) - 1).float().add_(0.5).mul_(2.0**-32)
    return -torch.log1p(-v.clamp_(max=1 - 2.0**-24))


@torch.library.custom_op(
    "effpass::token_noise", mutates_args=(), schema="(Tensor seed, Tensor columns, int vocabulary) -> Tensor"
)
def token_noise(seed: Tensor, columns: Tensor, vocabulary: int) -> Tensor:
    """Return the noise of all tokens of the given columns, positive float32 [B, J, V].

    Args:
        seed: int64 [].
        columns: int64 [B, J], output columns, 0 or more and below 2²⁴.
        vocabulary: vocabulary size V, up to 2²⁰.

    Raises:
        EffpassError: if V is out of range.
    """
    _check(vocabulary)
    return _token_noise(seed, columns, vocabulary)


def _check(vocabulary: int) -> None:
    if not 0 < vocabulary <= MOST_TOKENS:
        raise EffpassError(f"effpass::token_noise: {vocabulary} tokens", hint=f"it tells {MOST_TOKENS} apart")


@token_noise.register_fake
def _(seed, columns, vocabulary):  # type: ignore[no-untyped-def]
    _check(vocabulary)
    return columns.new_empty((*columns.shape, vocabulary), dtype=torch.float32)


@token_noise.register_kernel("cuda")
def _(seed, columns, vocabulary):  # type: ignore[no-untyped-def]
    _check(vocabulary)
    kernels = triton_kernels("token_noise")
    return (kernels.token_noise if kernels else _token_noise)(seed, columns, vocabulary)


@register_flop_formula(torch.ops.effpass.token_noise)
def _(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 0
