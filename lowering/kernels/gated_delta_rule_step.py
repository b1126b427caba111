"""Triton kernel of `effpass::gated_delta_rule_step`: a few tokens in one launch that reads and writes the state once.

    S ← Diag(e^g) S      S ← S + κ (ζ − Sᵀ κ)ᵀ      o = Sᵀ q̂

q̂, κ, ζ and g are those of :mod:`effpass.lowering.ops.gated_delta_rule_inputs`. One program handles BV columns of the
state [K, V] of one value head of one sequence; columns are independent of each other. All arithmetic is in float32, and
the output is rounded to the dtype of v. The kernel is bound by memory, 8 K V bytes per head. If the batch is small,
columns are split further so that all multiprocessors take part.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effpass.lowering.kernels.gated_delta_inputs import log_decay, root
from effpass.lowering.kernels.launch import multiprocessors
from effpass.lowering.ops.gated_delta_rule_inputs import EPSILON, Inputs, Settings

__all__ = ["step", "supported"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of a program: fewer columns if multiprocessors would have no programs, and twice the warps above 128 key channels.
_COLUMNS = 32
_WARPS = 2


@triton.jit
def _step(
    q, k, v, gate, beta, write_beta, A_log, dt_bias, state, output, T, HV, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    gate_b, gate_t, gate_h, beta_b, beta_t, beta_h, write_b, write_t, write_h, scale, lower_bound, epsilon,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    SCALAR_GATE: tl.constexpr, HAS_BIAS: tl.constexpr, SCALAR_BETA: tl.constexpr, HAS_WRITE: tl.constexpr,
    NORMALIZE: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(V, BV)
    lane = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = lane // HV, lane % HV
    rk, rv = tl.arange(0, BK), tl.program_id(0) % blocks * BV + tl.arange(0, BV)
    is_key, is_value = rk < K, rv < V
    is_state = is_key[:, None] & is_value
    state += lane * K * V + rk[:, None] * V + rv
    held = tl.load(state, mask=is_state, other=0)
    q += batch * q_b + head // GROUP * q_h + rk
    k += batch * k_b + head // GROUP * k_h + rk
    v += batch * v_b + head * v_h + rv
    gate += batch * gate_b + head * gate_h
    beta += batch * beta_b + head * beta_h
    write_beta += batch * write_b + head * write_h + rv
    rate = tl.exp(tl.load(A_log + head).to(tl.float32)) if GATE != "log" else 1.0
    for t in range(T):
        query = tl.load(q + t * q_t, mask=is_key, other=0).to(tl.float32)
        key = tl.load(k + t * k_t, mask=is_key, other=0).to(tl.float32)
        value = tl.load(v + t * v_t, mask=is_value, other=0).to(tl.float32)
        if NORMALIZE:
            query *= tl.rsqrt(tl.sum(query * query, 0) + epsilon)
            key *= tl.rsqrt(tl.sum(key * key, 0) + epsilon)
        query *= scale
        if SCALAR_BETA:
            erase = root(tl.load(beta + t * beta_t).to(tl.float32), LOGITS)
            key *= erase
            value *= erase
        else:
            key *= root(tl.load(beta + t * beta_t + rk, mask=is_key, other=0).to(tl.float32), LOGITS)
            if HAS_WRITE:
                strength = tl.load(write_beta + t * write_t, mask=is_value, other=0)
            else:
                strength = tl.load(beta + t * beta_t + rv, mask=is_value, other=0)
            value *= root(strength.to(tl.float32), LOGITS)
        if SCALAR_GATE:
            raw = tl.load(gate + t * gate_t).to(tl.float32)
            if HAS_BIAS:
                raw += tl.load(dt_bias + head).to(tl.float32)
            held *= tl.exp2(log_decay(raw, rate, lower_bound, GATE))
        else:
            raw = tl.load(gate + t * gate_t + rk, mask=is_key, other=0).to(tl.float32)
            if HAS_BIAS:
                raw += tl.load(dt_bias + head * K + rk, mask=is_key, other=0).to(tl.float32)
            held *= tl.exp2(log_decay(raw, rate, lower_bound, GATE))[:, None]
        change = value - tl.sum(key[:, None] * held, 0)
        held += key[:, None] * change[None, :]
        out = tl.sum(query[:, None] * held, 0)
        tl.store(output + ((batch * T + t) * HV + head) * V + rv, out.to(output.dtype.element_ty), mask=is_value)
    tl.store(state, held, mask=is_state)


def supported(inputs: Inputs, state: Tensor) -> bool:
    """Return whether the kernel supports the dtype and the head sizes of a call, with a contiguous state."""
    sizes = inputs.q.shape[3], inputs.v.shape[3]
    return inputs.q.dtype in _DTYPES and max(sizes) <= 256 and state.is_contiguous()


def _in_place(x: Tensor | None) -> Tensor | None:
    """Return `x` with contiguous channels, at any other strides, or a contiguous parameter; copied if necessary."""
    if x is None or x.dim() == 3 or (x.dim() == 4 and x.stride(3) == 1):
        return x
    return x.contiguous()


def step(inputs: Inputs, settings: Settings, state: Tensor) -> Tensor:
    """Return the output [B, T, HV, V] and update `state` in place. Arguments must have been checked."""
    tensors = Inputs(*(_in_place(x) for x in inputs))  # type: ignore[arg-type]
    q, _, v, gate, beta, write_beta, A_log, dt_bias = tensors
    (batch, tokens, heads, value_size), key_size = v.shape, q.shape[3]
    values = max(8, triton.next_power_of_2(value_size))
    each = min(values, _COLUMNS)
    while each > 8 and batch * heads * (values // each) < 2 * multiprocessors(q.device):
        each //= 2
    output = v.new_empty(v.shape)
    _step[(batch * heads * triton.cdiv(value_size, each),)](
        *(q if x is None else x for x in tensors), state, output, tokens, heads,
        *(n for x in tensors[:6] for n in ((0, 0, 0) if x is None else x.stride()[:3])), settings.scale,
        settings.lower_bound or 0.0, EPSILON, GROUP=heads // q.shape[2], K=key_size, V=value_size,
        BK=max(16, triton.next_power_of_2(key_size)), BV=each,
        GATE="log" if A_log is None else "softplus" if settings.lower_bound is None else "bounded",
        SCALAR_GATE=gate.dim() == 3, HAS_BIAS=dt_bias is not None, SCALAR_BETA=beta.dim() == 3,
        HAS_WRITE=write_beta is not None, NORMALIZE=settings.normalize, LOGITS=settings.beta_logits,
        num_warps=_WARPS if key_size <= 128 else 2 * _WARPS, num_stages=1,
    )  # fmt: skip
    return output
