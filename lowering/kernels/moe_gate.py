"""The gate of an expert inside Triton kernels: act(min(g, limit)) · (clamp(u, −limit, limit) + offset), in float32.

The symbols are those of :mod:`effpass.lowering.ops.moe_ffn`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effpass.lowering.kernels.small_linear import _activate

__all__ = ["gate"]


@triton.jit
def gate(g, u, alpha, limit, offset, ACTIVATION: tl.constexpr, LIMITED: tl.constexpr):
    """act(min(g, limit)) · (clamp(u, -limit, limit) + offset), float32."""
    if LIMITED:
        g = tl.minimum(g, limit)
        u = tl.minimum(tl.maximum(u, -limit), limit)
    if ACTIVATION == "silu":
        active = g / (1 + tl.exp(-alpha * g))
    else:
        active = _activate(g, ACTIVATION)
    return active * (u + offset)
