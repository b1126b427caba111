"""Triton kernel of `effpass::token_noise`: exponential noise from SplitMix64, in one launch.

    noise = −log(1 − v)      with v in (0, 1) from 32 bits of SplitMix64 at row · 2⁴⁴ + column · 2²⁰ + token

One program computes up to 1024 tokens of one column of one sequence. Bits are mixed in int64, the rest is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.launch import launch_options, overlaps

__all__ = ["token_noise"]


def token_noise(seed: Tensor, columns: Tensor, vocabulary: int) -> Tensor:
    """Run `effpass::token_noise`; the ranges of `columns` and `vocabulary` must have been checked."""
    rows, steps = columns.shape
    columns = columns.contiguous()
    out = torch.empty((rows, steps, vocabulary), dtype=torch.float32, device=columns.device)
    size = min(1024, triton.next_power_of_2(vocabulary))
    _noise[(triton.cdiv(vocabulary, size), rows * steps)](
        seed, columns, out, vocabulary, steps, SIZE=size, PDL=overlaps(out.device), **launch_options(out.device, 4)
    )
    return out


@triton.jit
def _mix(z, SHIFT: tl.constexpr):
    """z ^ (z >> SHIFT), of 64 bits without a sign."""
    return z ^ ((z >> SHIFT) & ((1 << (64 - SHIFT)) - 1))


@triton.jit(do_not_specialize=["vocabulary", "steps"])
def _noise(seed, columns, out, vocabulary, steps, SIZE: tl.constexpr, PDL: tl.constexpr):
    part, place = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = part * SIZE + tl.arange(0, SIZE)
    counter = ((place // steps) << 44) + (tl.load(columns + place) << 20) + token.to(tl.int64) + 1
    # 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB as signed numbers.
    z = tl.load(seed) + counter * -7046029254386353131
    z = _mix(z, 30) * -4658895280553007687
    z = _mix(z, 27) * -7723592293110705685
    z = _mix(z, 31)
    v = (((z >> 32) & 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    v = tl.minimum(v, 1 - 5.960464477539063e-08)
    # log(1 - v) loses the digits of a small v, for which a power series is used.
    small = 1.0 / 7
    for power in tl.static_range(6, 0, -1):
        small = small * v + 1.0 / power
    noise = tl.where(v < 0.0625, v * small, -tl.log(1 - v))
    tl.store(out + place * vocabulary + token, noise, mask=token < vocabulary)
