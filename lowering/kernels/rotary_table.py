"""Triton kernel of `effpass::rotary_table`: cosines and sines of rotary position embedding.

    a = p · f;  cos, sin = scaling · cos(a, a), scaling · sin(a, a)         p: positions, f: frequencies

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

__all__ = ["rotary_table", "supported"]


def supported(positions: Tensor, frequencies: Tensor) -> bool:
    """Return whether the kernel applies: outputs, of positions in any two-dimensional layout, have 32-bit offsets."""
    return positions.dim() == 2 and 2 * positions.numel() * frequencies.numel() < 1 << 31


def rotary_table(positions: Tensor, frequencies: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Run `effpass::rotary_table` on tensors that are :func:`supported`."""
    device, frequencies = positions.device, frequencies.contiguous()
    tokens, half = positions.shape[1], frequencies.shape[0]
    cos, sin = (torch.empty((*positions.shape, 2 * half), dtype=dtype, device=device) for _ in range(2))
    count, block = positions.numel() * half, 128
    if count:
        _table[(triton.cdiv(count, block),)](
            positions, frequencies, cos, sin, count, tokens, half, *positions.stride(), scaling,
            BLOCK=block, PDL=overlaps(device), **launch_options(device, 1),
        )  # fmt: skip
    return cos, sin


@triton.jit(do_not_specialize=["count", "tokens", "stride_of_row", "stride_of_token", "scaling"])
def _table(
    positions, frequencies, cos, sin, count, tokens, half, stride_of_row, stride_of_token, scaling,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    token, feature = place // half, place % half
    source = positions + token // tokens * stride_of_row + token % tokens * stride_of_token
    position = tl.load(source, mask=inside, other=0).to(tl.float32)
    angle = position * tl.load(frequencies + feature, mask=inside, other=0).to(tl.float32)
    first = token * 2 * half + feature
    cosine = (tl.cos(angle) * scaling).to(cos.dtype.element_ty)
    sine = (tl.sin(angle) * scaling).to(sin.dtype.element_ty)
    tl.store(cos + first, cosine, mask=inside)
    tl.store(cos + first + half, cosine, mask=inside)
    tl.store(sin + first, sine, mask=inside)
    tl.store(sin + first + half, sine, mask=inside)
