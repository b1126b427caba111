"""Triton kernel of `effpass::rotary_table`: cosines and sines of rotary position embedding from angles.

    cos, sin = scaling · cos(a, a), scaling · sin(a, a)

One program of one warp handles 128 angles and writes each result to both halves of the features. The computation is in
float32; results are rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.launch import launch_options, overlaps

__all__ = ["rotary_table"]


def rotary_table(angles: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Run `effpass::rotary_table` on float32 angles."""
    angles = angles.contiguous()
    shape = (*angles.shape[:-1], 2 * angles.shape[-1])
    cos, sin = (torch.empty(shape, dtype=dtype, device=angles.device) for _ in range(2))
    block = 128
    _table[(triton.cdiv(angles.numel(), block),)](
        angles, cos, sin, angles.numel(), angles.shape[-1], scaling,
        BLOCK=block, PDL=overlaps(angles.device), **launch_options(angles.device, 1),
    )  # fmt: skip
    return cos, sin


@triton.jit(do_not_specialize=["count", "scaling"])
def _table(angles, cos, sin, count, half, scaling, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    angle = tl.load(angles + place, mask=inside, other=0)
    first = place // half * 2 * half + place % half
    cosine = (tl.cos(angle) * scaling).to(cos.dtype.element_ty)
    sine = (tl.sin(angle) * scaling).to(sin.dtype.element_ty)
    tl.store(cos + first, cosine, mask=inside)
    tl.store(cos + first + half, cosine, mask=inside)
    tl.store(sin + first, sine, mask=inside)
    tl.store(sin + first + half, sine, mask=inside)
