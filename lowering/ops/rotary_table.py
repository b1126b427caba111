"""Cosines and sines of rotary position embedding from its angles, in one kernel launch.

    cos, sin = scaling · cos(a, a), scaling · sin(a, a)         a: angles of the first half of the features, repeated

They are computed in float32 and rounded once, as in transformers. Rotary embedding: https://arxiv.org/abs/2104.09864.

Shapes: B batch, T tokens, R rotated features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.lowering.ops.kernel_choice import triton_kernels

__all__ = ["TOLERANCE", "has_kernel", "rotary_table"]

#: Maximum deviation of the kernel's output from the reference: the last bit of the float32 value, which may change the
#: direction of rounding to a shorter dtype.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def has_kernel(device: torch.device, dtype: torch.dtype, rows: int) -> bool:
    """Whether a GPU kernel supports a dtype of the angles, for any number of positions."""
    return device.type == "cuda" and dtype == torch.float32 and triton_kernels("rotary_table") is not None


def _rotary_table(angles: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    both = torch.cat((angles, angles), dim=-1)
    return (both.cos() * scaling).to(dtype), (both.sin() * scaling).to(dtype)


@torch.library.custom_op(
    "effpass::rotary_table",
    mutates_args=(),
    schema="(Tensor angles, float scaling, ScalarType dtype) -> (Tensor, Tensor)",
)
def rotary_table(angles: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines of the given angles.

    Args:
        angles: float32 [B, T, R / 2], position times frequency.
        scaling: factor applied to both outputs.
        dtype: dtype of the outputs.

    Returns:
        Cosines and sines, [B, T, R] each.
    """
    return _rotary_table(angles, scaling, dtype)


@rotary_table.register_fake
def _(angles, scaling, dtype):  # type: ignore[no-untyped-def]
    shape = (*angles.shape[:-1], 2 * angles.shape[-1])
    return angles.new_empty(shape, dtype=dtype), angles.new_empty(shape, dtype=dtype)


@rotary_table.register_kernel("cuda")
def _(angles, scaling, dtype):  # type: ignore[no-untyped-def]
    kernels = triton_kernels("rotary_table")
    if kernels and angles.dtype == torch.float32:
        return kernels.rotary_table(angles, scaling, dtype)
    return _rotary_table(angles, scaling, dtype)


@register_flop_formula(torch.ops.effpass.rotary_table)
def _(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 0
