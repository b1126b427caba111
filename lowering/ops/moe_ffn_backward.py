"""Backward pass of `effpass::moe_ffn`, in matrix products grouped by expert.

    s[p] = W_downᵀ ḡ[t]        dweights[p] = h[p]·s[p] + b_down·ḡ[t]        dh[p] = weights[p] s[p]
    dW_down = Σ_p weights[p] ḡ[t] h[p]ᵀ    dW_gate_up = Σ_p dprojected[p] x[t]ᵀ    dx[t] = Σ_j W_gate_upᵀ dprojected[p]

ḡ is the gradient of `out`, and p the pair of token t with its j-th expert; everything else is defined in
:mod:`effpass.lowering.ops.moe_ffn`. The output itself is not recomputed, so that with a kept projection there are as
many products as without recomputation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.lowering.ops.moe_ffn import combine, gated, split
from effpass.lowering.ops.moe_ffn_grouped import Groups, group, linear, outer

__all__ = ["moe_ffn_backward"]


@torch.library.custom_op(
    "effpass::moe_ffn_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor x, Tensor experts, Tensor weights, Tensor gate_up, Tensor? gate_up_bias, "
    "Tensor down, Tensor? down_bias, Tensor? projected, str activation, float alpha, float limit, float offset, "
    "bool interleaved, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def moe_ffn_backward(
    gradient: Tensor,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    projected: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    offset: float,
    interleaved: bool,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, gate_up, gate_up_bias, down and down_bias; [0] for each that is not `needed`.

    Args:
        gradient: [T, D], gradient of `out`.
        projected: [P, 2 F], projection kept by the forward pass; None to recompute it.
        needed: for each of the six gradients, whether it is needed.

    The other arguments are those of `moe_ffn`.
    """
    for_x, for_weights, for_gate_up, for_gate_up_bias, for_down, for_down_bias = needed
    groups, each = group(experts, gate_up.shape[0]), experts.shape[1]
    token = groups.order // each
    rows, of_rows = x[token], gradient[token]
    if projected is None:
        projected = linear(rows, gate_up, gate_up_bias, groups)
    hidden = gated(projected, activation, alpha, limit, offset, interleaved)
    scale = weights.reshape(-1)[groups.order].unsqueeze(-1)
    weighted = (of_rows * scale).to(x.dtype)
    d_x = d_weights = d_gate_up = d_gate_up_bias = None
    if for_x or for_weights or for_gate_up or for_gate_up_bias:
        through = linear(of_rows, down.transpose(1, 2), None, groups)
        if for_weights:
            d_weights = _of_weights(hidden, through, of_rows, down_bias, groups, weights)
        if for_x or for_gate_up or for_gate_up_bias:
            d_projected = _of_gate(projected, through, scale, activation, alpha, limit, offset, interleaved)
            d_gate_up = outer(d_projected, rows, groups) if for_gate_up else None
            d_gate_up_bias = _sums(d_projected, groups) if for_gate_up_bias else None
            if for_x:
                d_rows = linear(d_projected, gate_up.transpose(1, 2), None, groups)
                d_x = combine(d_rows, groups, torch.ones_like(weights))
    d_down = outer(weighted, hidden, groups) if for_down else None
    d_down_bias = _sums(weighted, groups) if for_down_bias else None
    found = (d_x, d_weights, d_gate_up, d_gate_up_bias, d_down, d_down_bias)
    d_x, d_weights, d_gate_up, d_gate_up_bias, d_down, d_down_bias = (x.new_empty(0) if t is None else t for t in found)
    return d_x, d_weights, d_gate_up, d_gate_up_bias, d_down, d_down_bias


def _of_weights(
    hidden: Tensor, through: Tensor, of_rows: Tensor, down_bias: Tensor | None, groups: Groups, weights: Tensor
) -> Tensor:
    """Gradient of the router weights: inner product of each pair's output and ḡ; 0 without a local expert."""
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weights.dtype), torch.float32)
    common = (hidden.to(wide) * through).sum(-1)
    at = torch.arange(common.shape[0], device=common.device)
    if down_bias is not None:
        expert = torch.searchsorted(groups.ends, at, right=True).clamp_(max=down_bias.shape[0] - 1)
        common += (of_rows.to(wide) * down_bias[expert]).sum(-1)
    common = torch.where(at < groups.ends[-1], common, 0)
    out = torch.empty_like(common)
    out[groups.order] = common
    return out.view(weights.shape).to(weights.dtype)


def _of_gate(
    projected: Tensor,
    through: Tensor,
    scale: Tensor,
    activation: str,
    alpha: float,
    limit: float,
    offset: float,
    interleaved: bool,
) -> Tensor:
    """Gradient of the projection, [P, 2 F]."""
    wide = torch.promote_types(projected.dtype, torch.float32)
    of_hidden = through.to(wide) * scale
    gate, up = (t.to(wide) for t in split(projected, interleaved))
    bounded = gate.clamp(max=limit) if limit else gate
    factor = (up.clamp(min=-limit, max=limit) if limit else up) + offset
    active, slope = _activation(bounded, activation, alpha)
    d_gate, d_up = of_hidden * factor * slope, of_hidden * active
    if limit:
        d_gate, d_up = torch.where(gate <= limit, d_gate, 0), torch.where(up.abs() <= limit, d_up, 0)
    out = torch.empty_like(projected)
    for half, value in zip(split(out, interleaved), (d_gate, d_up), strict=True):
        half.copy_(value)
    return out


def _activation(x: Tensor, name: str, alpha: float) -> tuple[Tensor, Tensor]:
    """Activation of `x` and its derivative."""
    if name == "silu":
        sigmoid = torch.sigmoid(alpha * x)
        return x * sigmoid, sigmoid * (1 + alpha * x * (1 - sigmoid))
    if name == "relu":
        return x.relu(), (x > 0).to(x.dtype)
    approximate = "tanh" if name == "gelu_tanh" else "none"
    slope = torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate=approximate)
    return torch.nn.functional.gelu(x, approximate=approximate), slope


def _sums(rows: Tensor, groups: Groups) -> Tensor:
    """Sum of each expert's rows, [E, N]."""
    ones = rows.new_zeros(rows.shape[0], 8)  # the width that the alignment of torch._grouped_mm requires
    ones[:, 0] = 1
    return outer(ones, rows, groups)[:, 0].contiguous()


@moe_ffn_backward.register_fake
def _(gradient, x, experts, weights, gate_up, gate_up_bias, down, down_bias, projected, activation, alpha, limit,  # type: ignore[no-untyped-def]
      offset, interleaved, needed):  # fmt: skip
    inputs = (x, weights, gate_up, gate_up_bias, down, down_bias)
    return tuple(t.new_empty(t.shape) if wanted else x.new_empty(0) for t, wanted in zip(inputs, needed, strict=True))


@register_flop_formula(torch.ops.effpass.moe_ffn_backward)
def _(gradient: Any, x: Any, experts: Any, weights: Any, gate_up: Any, gate_up_bias: Any, down: Any, down_bias: Any,
      projected: Any, activation: Any, alpha: Any, limit: Any, offset: Any, interleaved: Any, needed: Any, *args: Any,
      out_val: Any = None, **kwargs: Any) -> Any:  # fmt: skip
    for_x, for_weights, for_gate_up, for_gate_up_bias, for_down, _ = needed
    first, second = 2 * experts[0] * experts[1] * down[1] * gate_up[1], 2 * experts[0] * experts[1] * down[1] * down[2]
    back = for_x or for_weights or for_gate_up or for_gate_up_bias
    firsts = (projected is None) + bool(for_gate_up) + bool(for_x)
    return first * firsts + second * (bool(back) + bool(for_down))
