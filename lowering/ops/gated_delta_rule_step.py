"""Decode step of the gated delta rule: one token, or a few, on a state that is updated in place.

Equation and shapes are those of :mod:`effpass.lowering.ops.gated_delta_rule`. The state keeps its address, so that a
step can be captured in a CUDA graph; the operator has no gradients. The GPU kernel is in
:mod:`effpass.lowering.kernels.gated_delta_rule_step`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.lowering.ops.gated_delta_rule_inputs import Inputs, Settings, check, check_values, prepared
from effpass.lowering.ops.kernel_choice import triton_kernels

__all__ = ["gated_delta_rule_step"]


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    write_beta: Tensor | None,
    state: Tensor,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    scale: float | None = None,
    normalize: bool = True,
    beta_logits: bool = True,
) -> Tensor:
    """Process T tokens in order; T is 1 in plain decoding.

    Args:
        state: float32 [B, HV, K, V], contiguous; written.

    The other arguments are those of :func:`~effpass.lowering.ops.gated_delta_rule.gated_delta_rule`.

    Returns:
        [B, T, HV, V], of v's dtype.

    Raises:
        EffpassError: if shapes, dtypes or devices don't fit, or a size other than B is 0; on the CPU also if values are
            out of range.
    """
    return torch.ops.effpass.gated_delta_rule_step(
        q, k, v, gate, beta, write_beta, A_log, dt_bias, state, lower_bound,
        q.shape[-1] ** -0.5 if scale is None else scale, normalize, beta_logits,
    )  # fmt: skip


def _step(*arguments: Any) -> Tensor:
    inputs, state, settings = Inputs(*arguments[:8]), arguments[8], Settings(*arguments[9:])
    check("gated_delta_rule_step", inputs, settings, state, inputs.q.shape[0])
    if inputs.q.shape[0] == 0:
        return inputs.v.new_empty(inputs.v.shape)
    if inputs.q.is_cuda:
        kernels = triton_kernels("gated_delta_rule_step")
        if kernels and kernels.supported(inputs, state):
            return kernels.step(inputs, settings, state)
    else:
        check_values("gated_delta_rule_step", inputs, settings)
    q, key, value, g = prepared(inputs, settings)
    outputs = []
    for t in range(q.shape[1]):
        state *= g[:, t, :, :, None].exp()
        change = value[:, t, :, None] - key[:, t, :, None] @ state
        state += key[:, t, :, :, None] * change
        outputs.append(q[:, t, :, None] @ state)
    return torch.cat(outputs, 2).transpose(1, 2).to(inputs.v.dtype).contiguous()


_op = torch.library.custom_op(
    "effpass::gated_delta_rule_step",
    _step,
    mutates_args=("state",),
    schema="(Tensor q, Tensor k, Tensor v, Tensor gate, Tensor beta, Tensor? write_beta, Tensor? A_log, "
    "Tensor? dt_bias, Tensor(a!) state, float? lower_bound, float scale, bool normalize, bool beta_logits) -> Tensor",
)


@_op.register_fake
def _(*arguments: Any) -> Tensor:
    inputs, state, settings = Inputs(*arguments[:8]), arguments[8], Settings(*arguments[9:])
    check("gated_delta_rule_step", inputs, settings, state, inputs.q.shape[0])
    return inputs.v.new_empty(inputs.v.shape)


@register_flop_formula(torch.ops.effpass.gated_delta_rule_step)
def _(q: Any, k: Any, v: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> Any:
    return 6 * v[0] * v[1] * v[2] * q[3] * v[3]
