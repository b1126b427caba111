"""Cosines and sines of rotary position embedding from positions and frequencies, in one kernel launch.

    a = p · f;  cos, sin = scaling · cos(a, a), scaling · sin(a, a)         p: positions, f: frequencies

The angles a are those of the first half of the features, repeated for the second. All is computed in float32, and
cosines and sines are rounded once, as in transformers. An angle is the rounded product of two float32 numbers, which is
also what a matrix product of inner dimension 1 gives. Rotary embedding: https://arxiv.org/abs/2104.09864.

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
#: direction of rounding to a shorter dtype. The angles are equal.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def has_kernel(device: torch.device, dtype: torch.dtype, rows: int) -> bool:
    """Whether a GPU kernel supports a dtype of the angles, for any number of positions."""
    return device.type == "cuda" and dtype == torch.float32 and triton_kernels("rotary_table") is not None


def _rotary_table(positions: Tensor, frequencies: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = positions[..., None].float() * frequencies.float()
    both = torch.cat((angles, angles), dim=-1)
    return (both.cos() * scaling).to(dtype), (both.sin() * scaling).to(dtype)


@torch.library.custom_op(
    "effpass::rotary_table",
    mutates_args=(),
    schema="(Tensor positions, Tensor frequencies, float scaling, ScalarType dtype) -> (Tensor, Tensor)",
)
def rotary_table(positions: Tensor, frequencies: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines of the angles of the given positions.

    Args:
        positions: int32 or int64 [B, T].
        frequencies: [R / 2], radians per position, of any floating-point dtype.
        scaling: factor applied to both outputs.
        dtype: dtype of the outputs.

    Returns:
        Cosines and sines, [B, T, R] each.
    """
    return _rotary_table(positions, frequencies, scaling, dtype)


@rotary_table.register_fake
def _(positions, frequencies, scaling, dtype):  # type: ignore[no-untyped-def]
    shape = (*positions.shape, 2 * frequencies.shape[0])
    return positions.new_empty(shape, dtype=dtype), positions.new_empty(shape, dtype=dtype)


@rotary_table.register_kernel("cuda")
def _(positions, frequencies, scaling, dtype):  # type: ignore[no-untyped-def]
    kernels = triton_kernels("rotary_table")
    if kernels and kernels.supported(positions, frequencies):
        return kernels.rotary_table(positions, frequencies, scaling, dtype)
    return _rotary_table(positions, frequencies, scaling, dtype)


@register_flop_formula(torch.ops.effpass.rotary_table)
def _(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 0
