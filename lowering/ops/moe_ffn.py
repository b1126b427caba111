"""A mixture-of-experts layer: the weighted sum of the outputs of the experts that each token is routed to.

    out[t] = Σ_j weights[t, j] · (W_down h(W_gate_up x[t] + b_gate_up) + b_down)     weights of expert experts[t, j]
    h(g, u) = act(min(g, limit)) · (clamp(u, -limit, limit) + offset)                 without clamping if limit is 0
    act(g) = g · σ(α g)  for silu     SwiGLU: α = 1, offset = 0; GPT-OSS: α = 1.702, limit = 7, offset = 1

Mixture of experts: https://arxiv.org/abs/2401.04088; SwiGLU: https://arxiv.org/abs/2002.05202. Expert ids of E or more
denote experts that are not local (expert parallelism) and add nothing. Every sum has a fixed order, so that results are
bitwise reproducible. Rounding follows transformers: each product and the gate in x's dtype, the weighted sum over the
experts of a token in float32.

Shapes: T tokens, k experts per token, P = T·k pairs of a token and an expert, D hidden size, E local experts, F
intermediate size of an expert. GPU kernels are in :mod:`effpass.lowering.kernels.moe_rows` (few tokens) and
:mod:`effpass.lowering.kernels.moe_grouped`; :mod:`effpass.lowering.ops.moe_ffn_choice` chooses between them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.core.errors import EffpassError, did_you_mean
from effpass.lowering.ops.fused_linear import ACTIVATIONS
from effpass.lowering.ops.moe_ffn_grouped import Groups, group, linear

__all__ = ["TOLERANCE", "check", "combine", "gated", "moe_ffn", "split"]

#: Maximum deviation of a kernel's output from the reference, relative to the largest value of the output. The kernel
#: keeps float32 between the first product and h, where the reference rounds four times, and it sums in another order.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-6}


def split(projected: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Split `projected` [..., 2 F] into gate and up, [..., F] each, as views: halves, or even and odd columns."""
    if interleaved:
        return projected[..., ::2], projected[..., 1::2]
    gate, up = projected.chunk(2, dim=-1)
    return gate, up


def gated(projected: Tensor, activation: str, alpha: float, limit: float, offset: float, interleaved: bool) -> Tensor:
    """Compute h: [..., 2 F] → [..., F]."""
    gate, up = split(projected, interleaved)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    active = gate * torch.sigmoid(gate * alpha) if alpha != 1 else ACTIVATIONS[activation](gate)
    return active * (up + offset) if offset else active * up


def combine(outputs: Tensor, groups: Groups, weights: Tensor) -> Tensor:
    """Weighted sum over the experts of each token, in the order in which the token lists them.

    Args:
        outputs: [P, D], sorted by expert.
        groups: grouping of the outputs by expert.
        weights: [T, k].

    Returns:
        [T, D], of the dtype of `outputs`.
    """
    (tokens, each), width = weights.shape, outputs.shape[1]
    place = torch.empty_like(groups.order)
    place[groups.order] = torch.arange(place.shape[0], device=place.device)
    here = (place < groups.ends[-1]).view(tokens, each, 1)
    wide = torch.promote_types(torch.promote_types(outputs.dtype, weights.dtype), torch.float32)
    # Outputs of pairs without a local expert are undefined and may be NaN.
    weighted = torch.where(here, outputs[place].view(tokens, each, width) * weights.to(wide).unsqueeze(-1), 0)
    return weighted.sum(1).to(outputs.dtype)


def _moe_ffn(
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
    keep: bool,
) -> tuple[Tensor, Tensor]:
    groups = group(experts, gate_up.shape[0])
    rows = x[groups.order // experts.shape[1]]
    projected = linear(rows, gate_up, gate_up_bias, groups)
    outputs = linear(gated(projected, activation, alpha, limit, offset, interleaved), down, down_bias, groups)
    return combine(outputs, groups, weights), projected if keep else x.new_empty(0)


@torch.library.custom_op(
    "effpass::moe_ffn",
    mutates_args=(),
    schema="(Tensor x, Tensor experts, Tensor weights, Tensor gate_up, Tensor? gate_up_bias, Tensor down, "
    "Tensor? down_bias, str activation, float alpha, float limit, float offset, bool interleaved, bool keep) "
    "-> (Tensor, Tensor)",
)
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
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """A layer of local experts.

    Args:
        x: [T, D].
        experts: int [T, k], nonnegative expert ids; an id of E or more denotes an expert that is not local and adds
            nothing.
        weights: [T, k], router weights, in x's dtype or float32.
        gate_up: [E, 2 F, D], any strides; GPT-OSS's [E, D, 2 F] can be passed as a transposed view.
        gate_up_bias: [E, 2 F] or None.
        down: [E, D, F], any strides.
        down_bias: [E, D] or None.
        activation: a key of :data:`~effpass.lowering.ops.fused_linear.ACTIVATIONS`.
        alpha: α; must be 1 unless the activation is silu.
        limit: bound on gate and up; 0 for none.
        offset: number added to up.
        interleaved: whether gate and up are the even and odd rows of `gate_up`, instead of its halves.
        keep: whether to return the projection, which saves the backward pass from recomputing it.

    Returns:
        out: [T, D], of x's dtype.
        projected: with `keep` the first product, [P, 2 F] sorted by expert, whose rows without a local expert are
            undefined; otherwise [0].

    Raises:
        EffpassError: if shapes, dtypes, the activation or α don't fit; on the CPU also if an id is negative.
    """
    check(x, experts, weights, gate_up, gate_up_bias, down, down_bias, activation, alpha)
    return _moe_ffn(
        x, experts, weights, gate_up, gate_up_bias, down, down_bias, activation, alpha, limit, offset, interleaved, keep
    )


def check(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
) -> None:
    """Raise an :class:`EffpassError` if the arguments of a layer of experts don't fit together."""
    if activation not in ACTIVATIONS:
        raise EffpassError(f"effpass::moe_ffn: activation {activation!r}" + did_you_mean(activation, ACTIVATIONS))
    if alpha != 1 and activation != "silu":
        raise EffpassError(f"effpass::moe_ffn: alpha is {alpha} and the activation {activation!r}; only silu has one")
    if x.dim() != 2 or experts.dim() != 2 or experts.shape[0] != x.shape[0] or weights.shape != experts.shape:
        raise EffpassError(
            f"effpass::moe_ffn: x is {tuple(x.shape)}, experts {tuple(experts.shape)}, weights {tuple(weights.shape)}",
            hint="x is [T, D], experts and weights are both [T, k]",
        )
    if gate_up.dim() != 3 or down.dim() != 3:
        raise EffpassError(f"effpass::moe_ffn: gate_up is {tuple(gate_up.shape)}, down {tuple(down.shape)}")
    (count, both, width), (_, _, inner) = gate_up.shape, down.shape
    if width != x.shape[1] or both != 2 * inner or down.shape[:2] != (count, width):
        raise EffpassError(
            f"effpass::moe_ffn: x is {tuple(x.shape)}, gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)}",
            hint="gate_up is [E, 2 F, D] and down [E, D, F] where x is [T, D]",
        )
    for bias, size in ((gate_up_bias, both), (down_bias, width)):
        if bias is not None and bias.shape != (count, size):
            raise EffpassError(f"effpass::moe_ffn: a bias is {tuple(bias.shape)}, expected {(count, size)}")
    same = [t for t in (gate_up, gate_up_bias, down, down_bias) if t is not None]
    if any(t.dtype != x.dtype for t in same):
        found = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in same}))
        raise EffpassError(f"effpass::moe_ffn: x is {str(x.dtype).removeprefix('torch.')} and the experts {found}")


@moe_ffn.register_fake
def _(x, experts, weights, gate_up, gate_up_bias, down, down_bias, activation, alpha, limit, offset, interleaved, keep):  # type: ignore[no-untyped-def]
    check(x, experts, weights, gate_up, gate_up_bias, down, down_bias, activation, alpha)
    pairs = experts.shape[0] * experts.shape[1]
    return x.new_empty(x.shape), x.new_empty((pairs, gate_up.shape[1]) if keep else 0)


@moe_ffn.register_kernel("cuda")
def _(x, experts, weights, gate_up, gate_up_bias, down, down_bias, activation, alpha, limit, offset, interleaved, keep):  # type: ignore[no-untyped-def]
    from effpass.lowering.ops.moe_ffn_choice import run

    check(x, experts, weights, gate_up, gate_up_bias, down, down_bias, activation, alpha)
    arguments = (x, experts, weights, gate_up, gate_up_bias, down, down_bias, activation, alpha, limit, offset,
                 interleaved)  # fmt: skip
    out = None if keep else run(*arguments)
    return _moe_ffn(*arguments, keep) if out is None else (out, x.new_empty(0))


@register_flop_formula(torch.ops.effpass.moe_ffn)
def _(x: Any, experts: Any, weights: Any, gate_up: Any, gate_up_bias: Any, down: Any, *args: Any,
      out_val: Any = None, **kwargs: Any) -> Any:  # fmt: skip
    return 2 * experts[0] * experts[1] * down[1] * (gate_up[1] + down[2])


# -- gradients --------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, activation, alpha, limit, offset, interleaved, keep = inputs
    ctx.save_for_backward(*tensors, output[1] if keep else None)
    ctx.constants = (activation, alpha, limit, offset, interleaved)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: Tensor | None, _: Any) -> Any:
    import effpass.lowering.ops.moe_ffn_backward  # noqa: F401  (registers the operator)

    if gradient is None:
        return (None,) * 13
    needed = [ctx.needs_input_grad[place] for place in (0, 2, 3, 4, 5, 6)]
    found = torch.ops.effpass.moe_ffn_backward(gradient, *ctx.saved_tensors, *ctx.constants, needed)
    x, weights, *rest = (tensor if wanted else None for tensor, wanted in zip(found, needed, strict=True))
    return (x, None, weights, *rest, *(None,) * 6)


moe_ffn.register_autograd(_backward, setup_context=_save)
