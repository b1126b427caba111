"""A layer of experts pair by pair in float64, and random layers to compare with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["GATES", "error", "layer", "moe_ffn"]

# activation, alpha, limit, offset, interleaved
GATES: dict[str, tuple[str, float, float, float, bool]] = {
    "SwiGLU": ("silu", 1.0, 0.0, 0.0, False),
    "GPT-OSS": ("silu", 1.702, 1.5, 1.0, True),
    "GELU": ("gelu", 1.0, 0.0, 0.0, False),
    "GELU by tanh, limited": ("gelu_tanh", 1.0, 1.0, 0.0, False),
    "ReLU, interleaved": ("relu", 1.0, 0.0, 0.5, True),
}


def layer(
    tokens: int,
    each: int,
    experts: int,
    width: int,
    inner: int,
    *,
    biases: bool = False,
    transposed: bool = False,
    absent: int = 0,
    skewed: bool = False,
    dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> list[Any]:
    """x, experts, weights, gate_up, its bias, down, its bias.

    Args:
        transposed: whether weights are stored [E, D, 2 F] and [E, F, D].
        absent: how many ids beyond the experts occur.
        skewed: whether every token goes to the first expert.
    """
    generator = torch.Generator().manual_seed(tokens * 1000 + inner)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def weight(rows: int, columns: int) -> Tensor:
        value = (some(experts, rows, columns) * columns**-0.5).to(device, dtype)
        return value.transpose(1, 2).contiguous().transpose(1, 2) if transposed else value

    x = some(tokens, width).to(device, dtype)
    ids = torch.rand(tokens, experts + absent, generator=generator).topk(each).indices
    ids = (torch.zeros_like(ids) if skewed else ids).to(device)
    routing = torch.rand(tokens, each, generator=generator, dtype=torch.float64).to(device, weights_dtype or dtype)
    gate_up, down = weight(2 * inner, width), weight(width, inner)
    gate_up_bias, down_bias = (
        (some(experts, n) * 0.3).to(device, dtype) if biases else None for n in (2 * inner, width)
    )
    return [x, ids, routing, gate_up, gate_up_bias, down, down_bias]


def moe_ffn(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    offset: float,
    interleaved: bool,
) -> Tensor:
    """[T, D], float64."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    inner = down.shape[2]
    for t in range(x.shape[0]):
        for j in range(experts.shape[1]):
            e = int(experts[t, j])
            if e >= gate_up.shape[0]:
                continue
            p = gate_up[e].double() @ x[t].double()
            if gate_up_bias is not None:
                p = p + gate_up_bias[e].double()
            g, u = (p[0::2], p[1::2]) if interleaved else (p[:inner], p[inner:])
            if limit:
                g, u = torch.minimum(g, g.new_tensor(limit)), u.clip(-limit, limit)
            y = down[e].double() @ (_activation(g, activation, alpha) * (u + offset))
            if down_bias is not None:
                y = y + down_bias[e].double()
            out[t] += weights[t, j].double() * y
    return out


def _activation(x: Tensor, name: str, alpha: float) -> Tensor:
    if name == "silu":
        return x / (1 + torch.exp(-alpha * x))
    if name == "gelu":
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))
    if name == "gelu_tanh":
        return x * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return x.clip(min=0)


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value; NaN where `got` has one."""
    return float((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
