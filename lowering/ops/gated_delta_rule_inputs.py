"""Inputs of the gated delta rule's recurrence, computed from a layer's projections: values, gradients and checks.

    q̂ = scale · q/‖q‖      κ = √β ⊙ k/‖k‖      ζ = √β_w ⊙ v      g ≤ 0: the log of the decay
    g = −exp(A_log) · softplus(gate + dt_bias)      or, bounded, g = lower_bound · σ(exp(A_log) · (gate + dt_bias))

β and β_w may be given as logits x. Then √σ(x) is computed as exp(½ log σ(x)), whose derivative ½ √σ(x) σ(−x) is finite
everywhere. Shapes are those of :mod:`effpass.lowering.ops.gated_delta_rule`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effpass.core.errors import EffpassError

__all__ = ["EPSILON", "SMALLEST_BETA", "Inputs", "Settings", "check", "check_values", "prepared", "prepared_backward"]

EPSILON = 1e-6  # added to the sum of squares of q and k before the square root, as in flash-linear-attention
SMALLEST_BETA = 1e-12  # keeps the derivative of √β finite; too small to affect κκᵀ


class Inputs(NamedTuple):
    """The tensors of a call; shapes as in :func:`~effpass.lowering.ops.gated_delta_rule.gated_delta_rule`."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    beta: Tensor
    write_beta: Tensor | None
    A_log: Tensor | None
    dt_bias: Tensor | None


class Settings(NamedTuple):
    """The constants of a call."""

    lower_bound: float | None
    scale: float
    normalize: bool
    beta_logits: bool


class Prepared(NamedTuple):
    """Inputs of the recurrence, in float32, or float64 for float64 inputs.

    Attributes:
        q: q̂, [B, T, HV, K].
        key: κ, [B, T, HV, K].
        value: ζ, [B, T, HV, V].
        g: log decay, [B, T, HV, K] or [B, T, HV, 1].
    """

    q: Tensor
    key: Tensor
    value: Tensor
    g: Tensor


def _repeated(x: Tensor, heads: int) -> Tensor:
    """[B, T, H, K] → [B, T, HV, K]: value head i uses head i // (HV / H)."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _root(beta: Tensor, beta_logits: bool) -> Tensor:
    return (0.5 * F.logsigmoid(beta)).exp() if beta_logits else beta.clamp(min=SMALLEST_BETA).sqrt()


def _per_head(x: Tensor, like: Tensor) -> Tensor:
    """Shape [HV] for broadcasting with `like` [B, T, HV, X] or [B, T, HV]."""
    return x[:, None] if like.dim() == 4 else x


def _gates(inputs: Inputs, settings: Settings) -> Tensor:
    gate = inputs.gate
    if inputs.A_log is None:
        return gate
    rate = _per_head(inputs.A_log.exp(), gate)
    raw = gate if inputs.dt_bias is None else gate + inputs.dt_bias
    if settings.lower_bound is None:
        return -rate * F.softplus(raw)
    return settings.lower_bound * torch.sigmoid(rate * raw)


def _wide(inputs: Inputs) -> Inputs:
    wide = torch.promote_types(inputs.q.dtype, torch.float32)
    return Inputs(*(None if x is None else x.to(wide) for x in inputs))  # type: ignore[arg-type]


def _inverse_norm(x: Tensor) -> Tensor:
    return torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON)


def prepared(inputs: Inputs, settings: Settings) -> Prepared:
    """Compute q̂, κ, ζ and g from the inputs of a call."""
    inputs = _wide(inputs)
    q, k, v, _, beta, write_beta, *_ = inputs
    if settings.normalize:
        q, k = q * _inverse_norm(q), k * _inverse_norm(k)
    heads = v.shape[2]
    erase = _root(beta, settings.beta_logits)
    write = erase if write_beta is None else _root(write_beta, settings.beta_logits)
    erase, write = (r if r.dim() == 4 else r[..., None] for r in (erase, write))
    g = _gates(inputs, settings)
    return Prepared(
        settings.scale * _repeated(q, heads),
        erase * _repeated(k, heads),
        write * v,
        g if g.dim() == 4 else g[..., None],
    )


def prepared_backward(inputs: Inputs, settings: Settings, gradients: Prepared) -> tuple[Tensor | None, ...]:
    """Gradients of `inputs`, in the order of its fields, from those of :func:`prepared`; None for None inputs."""
    types = [None if x is None else x.dtype for x in inputs]
    inputs = _wide(inputs)
    q, k, v, _, beta, write_beta, *_ = inputs
    heads = v.shape[2]
    erase = _root(beta, settings.beta_logits)
    write = erase if write_beta is None else _root(write_beta, settings.beta_logits)
    of_erase, of_write = (r if r.dim() == 4 else r[..., None] for r in (erase, write))
    unit = _repeated(k * _inverse_norm(k) if settings.normalize else k, heads)
    d_erase, d_write = unit * gradients.key, v * gradients.value
    if beta.dim() == 3:
        d_erase = d_erase.sum(-1)
    if write_beta is None:
        d_erase = d_erase + (d_write.sum(-1) if beta.dim() == 3 else d_write)
    d_q = _norm_backward(q, settings.scale * gradients.q, settings.normalize)
    d_k = _norm_backward(k, of_erase * gradients.key, settings.normalize)
    d_gate, d_A_log, d_dt_bias = _gates_backward(inputs, settings, gradients.g)
    found = (
        d_q,
        d_k,
        of_write * gradients.value,
        d_gate,
        _root_backward(beta, erase, d_erase, settings.beta_logits),
        None if write_beta is None else _root_backward(write_beta, write, d_write, settings.beta_logits),
        d_A_log,
        d_dt_bias,
    )
    return tuple(None if x is None or t is None else x.to(t) for x, t in zip(found, types, strict=True))


def _root_backward(beta: Tensor, root: Tensor, gradient: Tensor, beta_logits: bool) -> Tensor:
    return gradient * (0.5 * root * torch.sigmoid(-beta) if beta_logits else 0.5 / root)


def _norm_backward(x: Tensor, gradient: Tensor, normalize: bool) -> Tensor:
    """Gradient of `x` [B, T, H, K] from that of x/‖x‖ repeated to the value heads, [B, T, HV, K]."""
    gradient = gradient.unflatten(2, (x.shape[2], -1)).sum(3)
    if not normalize:
        return gradient
    inverse = _inverse_norm(x)
    unit = x * inverse
    return inverse * (gradient - unit * (unit * gradient).sum(-1, keepdim=True))


def _gates_backward(
    inputs: Inputs, settings: Settings, gradient: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    gate, A_log, dt_bias = inputs.gate, inputs.A_log, inputs.dt_bias
    gradient = gradient if gate.dim() == 4 else gradient[..., 0]
    if A_log is None:
        return gradient, None, None
    rate, raw = _per_head(A_log.exp(), gate), gate if dt_bias is None else gate + dt_bias
    if settings.lower_bound is None:
        of_raw = -rate * torch.sigmoid(raw) * gradient
        of_rate = -rate * F.softplus(raw) * gradient
    else:
        share = torch.sigmoid(rate * raw)
        of_raw = rate * settings.lower_bound * share * (1 - share) * gradient
        of_rate = raw * of_raw
    d_A_log = of_rate.flatten(3).sum(-1).sum((0, 1)) if gate.dim() == 4 else of_rate.sum((0, 1))
    return of_raw, d_A_log, None if dt_bias is None else of_raw.sum((0, 1))


# -- checks -----------------------------------------------------------------------------------------------------------


def check(
    name: str,
    inputs: Inputs,
    settings: Settings,
    state: Tensor | None,
    sequences: int,
    cu_seqlens: Tensor | None = None,
) -> None:
    """Check shapes, dtypes and devices.

    Args:
        name: name of the operator, for messages.
        inputs: tensors of the call.
        settings: constants of the call.
        state: [N, HV, K, V] or None.
        sequences: number of sequences N.
        cu_seqlens: offsets of packed sequences, of which only the device is checked here; or None.

    Raises:
        EffpassError: if something doesn't fit; the message gives the shapes, dtypes or devices received.
    """
    q, k, v, gate, beta, write_beta, A_log, dt_bias = inputs

    def refuse(what: str, hint: str) -> EffpassError:
        return EffpassError(f"effpass::{name}: {what}", hint=hint)

    def shape(x: Tensor | None) -> str:
        return "None" if x is None else str(tuple(x.shape))

    is_fit = q.dim() == 4 and k.shape == q.shape and v.dim() == 4 and v.shape[:2] == q.shape[:2]
    if is_fit:
        sizes = {"T": q.shape[1], "H": q.shape[2], "K": q.shape[3], "HV": v.shape[2], "V": v.shape[3]}
        for letter, size in sizes.items():
            if size == 0:
                raise refuse(f"q is {shape(q)} and v {shape(v)}: {letter} = 0", f"{letter} is at least 1")
    if not is_fit or v.shape[2] % q.shape[2]:
        raise refuse(
            f"q is {shape(q)}, k {shape(k)} and v {shape(v)}",
            "q and k are [B, T, H, K] and v is [B, T, HV, V], where H divides HV",
        )
    (batch, tokens, heads, value_size), key_size = v.shape, q.shape[3]
    of_heads = (batch, tokens, heads)
    if gate.shape not in (of_heads, (*of_heads, key_size)):
        raise refuse(f"gate is {shape(gate)} and q {shape(q)}", "gate is [B, T, HV, K], or [B, T, HV] for a scalar one")
    if beta.shape not in (of_heads, (*of_heads, key_size)):
        raise refuse(f"beta is {shape(beta)} and q {shape(q)}", "beta is [B, T, HV], or [B, T, HV, K]")
    if write_beta is None and beta.dim() == 4 and key_size != value_size:
        raise refuse(
            f"beta is {shape(beta)} for keys of {key_size} and values of {value_size} channels",
            "one vector for both needs K = V; give write_beta [B, T, HV, V] for the values",
        )
    if write_beta is not None and (beta.dim() != 4 or write_beta.shape != v.shape):
        raise refuse(
            f"beta is {shape(beta)}, write_beta {shape(write_beta)} and v {shape(v)}",
            "with write_beta [B, T, HV, V], beta is [B, T, HV, K]",
        )
    if A_log is None and (dt_bias is not None or settings.lower_bound is not None):
        raise refuse("dt_bias or lower_bound without A_log", "without A_log, gate is the log of the decay itself")
    if A_log is not None and A_log.shape != (heads,):
        raise refuse(f"A_log is {shape(A_log)} for {heads} value heads", "A_log is [HV]")
    if dt_bias is not None and dt_bias.shape != gate.shape[2:]:
        raise refuse(f"dt_bias is {shape(dt_bias)} and gate {shape(gate)}", "dt_bias is [HV, K] or [HV], like the gate")
    if settings.lower_bound is not None and not -1e4 < settings.lower_bound < 0:
        raise refuse(f"lower_bound is {settings.lower_bound}", "a bound on the log of the decay is negative")
    if any(not x.is_floating_point() for x in inputs if x is not None) or k.dtype != q.dtype or v.dtype != q.dtype:
        found = ", ".join(str(x.dtype).removeprefix("torch.") for x in inputs if x is not None)
        raise refuse(f"the inputs are {found}", "q, k and v have one floating-point type, the others any")
    devices = {field: x.device for field, x in zip(Inputs._fields, inputs, strict=True) if x is not None}
    devices |= {field: x.device for field, x in (("state", state), ("cu_seqlens", cu_seqlens)) if x is not None}
    for field, device in devices.items():
        if device != q.device:
            raise refuse(f"q is on {q.device} and {field} on {device}", "all tensors of a call are on one device")
    wide = torch.promote_types(q.dtype, torch.float32)
    if state is not None and (state.shape != (sequences, heads, key_size, value_size) or state.dtype != wide):
        raise refuse(
            f"the state is {str(state.dtype).removeprefix('torch.')} {shape(state)}",
            f"it is {str(wide).removeprefix('torch.')} [N, HV, K, V], here {(sequences, heads, key_size, value_size)}",
        )


def check_values(name: str, inputs: Inputs, settings: Settings) -> None:
    """Check the range of values. For the CPU only: on a GPU the check would have to wait for the device.

    Raises:
        EffpassError: if β lies outside [0, 2], the range in which |1 − β‖k‖²| ≤ 1 and the state cannot grow, or if a
            log decay is positive.
    """
    for field, beta in (("beta", inputs.beta), ("write_beta", inputs.write_beta)):
        if beta is not None and not settings.beta_logits and not bool(((beta >= 0) & (beta <= 2)).all()):
            raise EffpassError(
                f"effpass::{name}: {field} holds {float(beta.min()):g} to {float(beta.max()):g}",
                hint="it lies in [0, 2]; give logits with beta_logits=True",
            )
    if inputs.A_log is None and bool((inputs.gate > 0).any()):
        raise EffpassError(
            f"effpass::{name}: the log of the decay is up to {float(inputs.gate.max()):g}",
            hint="it is not positive; give A_log for a raw gate",
        )
