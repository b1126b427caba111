"""Linear attention with the gated delta rule, with per-channel decay and per-channel step sizes.

    S_t = (I − κ_t κ_tᵀ) Diag(e^g_t) S_{t−1} + κ_t ζ_tᵀ        o_t = S_tᵀ q̂_t        S ∈ R^{K×V}
    κ = √β ⊙ k/‖k‖      ζ = √β_w ⊙ v      q̂ = scale · q/‖q‖

S is the state of a value head, g ≤ 0 the log of the decay, β the erase strength and β_w the write strength. Special
cases are:

* FG²-GDN (https://arxiv.org/abs/2604.19021): β_w = β, a vector over the channels (K = V). FG²-GDN+: β and β_w are two
  vectors, one to erase and one to write.
* KDA (https://arxiv.org/abs/2510.26692): one β per head, with β κκᵀ and β κvᵀ, which equals √β on both factors.
* Gated delta rule (https://arxiv.org/abs/2412.06464): one β and one decay g per head.

:func:`reference` defines the operator token by token. On the CPU it is computed in chunks
(:mod:`effpass.lowering.ops.gated_delta_rule_chunks`), on a GPU by the kernels of
:mod:`effpass.lowering.kernels.gated_delta_rule`. The forward pass saves its inputs and its output, and on a GPU
the matrices P and T of each chunk; the backward pass recomputes the rest. g, √β and the state are float32 (float64 for
float64 inputs).

Shapes: B batch, T tokens, N sequences (B, or those of `cu_seqlens`), H query and key heads, HV value heads, K key size,
V value size.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.core.errors import EffpassError
from effpass.lowering.ops.gated_delta_rule_chunks import Chunks, chunk_backward, chunk_forward
from effpass.lowering.ops.gated_delta_rule_inputs import (
    Inputs,
    Prepared,
    Settings,
    check,
    check_values,
    prepared,
    prepared_backward,
)
from effpass.lowering.ops.kernel_choice import triton_kernels

__all__ = ["TOLERANCE", "gated_delta_rule", "reference"]

#: Maximum deviation of an output from the reference in float64, as root mean square relative to that of the reference.
#: Kernels round κ, q̂, ζ, U and the state to the inputs' dtype before a product.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-10}

#: Maximum deviation of a gradient, measured alike; a gradient is a sum of products of rounded factors.
GRADIENT_TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-8}

#: Further deviation of each element of a result in float16 that is below its normal numbers altogether: decays, and
#: products with them, are rounded to multiples of 2^-24, of which such a result is a sum.
FLOAT16_TOLERANCE = 2**-23

#: Maximum deviation of the gradients of `A_log` and `dt_bias`, which are sums over all tokens with terms that cancel.
SUM_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float64: 1e-8}


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    write_beta: Tensor | None = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalize: bool = True,
    beta_logits: bool = True,
) -> tuple[Tensor, Tensor]:
    """Run the gated delta rule over whole sequences; differentiable in all tensors but `cu_seqlens`.

    Used for training and prefill; for decoding there is :mod:`effpass.lowering.ops.gated_delta_rule_step`. On a GPU,
    few long sequences are computed in segments, so that a sequence's rounding depends on how many others there are.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, HV, V], where HV is a multiple of H; value head i uses query head i // (HV / H).
        gate: [B, T, HV, K], or [B, T, HV] for one decay per head. With `A_log` the raw gate; without it g itself, which
            must not be positive.
        beta: [B, T, HV] or [B, T, HV, K], erase strength, and also the write strength if `write_beta` is None (a vector
            for both needs K = V).
        write_beta: [B, T, HV, V], write strength; requires `beta` [B, T, HV, K].
        A_log: [HV], for g = −exp(A_log) · softplus(gate + dt_bias); None if `gate` is g.
        dt_bias: [HV, K] or [HV], as the gate has channels or not; None for no bias.
        lower_bound: negative bound for g = lower_bound · σ(exp(A_log) · (gate + dt_bias)) instead; None for no bound.
            Kernels are fastest for bounds of −5 or above.
        scale: factor applied to the queries; K^(−1/2) by default.
        initial_state: float32 [N, HV, K, V]; zeros by default.
        cu_seqlens: int32 or int64 [N + 1], offsets of the sequences that are packed along T (B = 1), ending with T;
            None for B sequences of T tokens.
        normalize: whether to divide q and k by their norms.
        beta_logits: whether to apply a sigmoid to `beta` and `write_beta`; without it they must be in [0, 2].

    Returns:
        output: [B, T, HV, V], of v's dtype.
        final_state: float32 [N, HV, K, V] (float64 for float64 inputs).

    Raises:
        EffpassError: if shapes, dtypes or devices don't fit, or a size other than B is 0; on the CPU also if values are
            out of range or `cu_seqlens` does not rise monotonically from 0 to T. On a GPU such a `cu_seqlens` fails a
            device assertion.
    """
    output, final_state, _, _ = torch.ops.effpass.gated_delta_rule(
        q, k, v, gate, beta, write_beta, A_log, dt_bias, initial_state, cu_seqlens, lower_bound,
        q.shape[-1] ** -0.5 if scale is None else scale, normalize, beta_logits,
    )  # fmt: skip
    return output, final_state


def reference(
    inputs: Inputs, settings: Settings, initial_state: Tensor | None, ends: list[int]
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence token by token; differentiable.

    Args:
        inputs: tensors of :func:`gated_delta_rule`.
        settings: constants of :func:`gated_delta_rule`.
        initial_state: [N, HV, K, V]; None for zeros.
        ends: offsets of the sequences among the B T tokens, ending with B T.

    Returns:
        Output and final state, as :func:`gated_delta_rule`.
    """
    q, key, value, g = (x.flatten(0, 1) for x in prepared(inputs, settings))
    outputs, states = [], []
    for n, (start, stop) in enumerate(itertools.pairwise(ends)):
        shape = (*key.shape[1:], value.shape[-1])
        state = q.new_zeros(shape) if initial_state is None else initial_state[n]
        for t in range(start, stop):
            state = state * g[t, :, :, None].exp()
            change = value[t] - (key[t, :, :, None] * state).sum(-2)
            state = state + key[t, :, :, None] * change[:, None]
            outputs.append((q[t, :, :, None] * state).sum(-2))
        states.append(state)
    return torch.stack(outputs).view(inputs.v.shape).to(inputs.v.dtype), torch.stack(states)


# -- the operator -----------------------------------------------------------------------------------------------------

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor gate, Tensor beta, Tensor? write_beta, Tensor? A_log, Tensor? dt_bias, "
    "Tensor? initial_state, Tensor? cu_seqlens"
)
_CONSTANTS = "float? lower_bound, float scale, bool normalize, bool beta_logits"


def _arguments(arguments: tuple[Any, ...]) -> tuple[Inputs, Settings, Tensor | None, Tensor | None, int]:
    """Check the arguments; returns inputs, settings, initial state, cu_seqlens and the number of sequences."""
    inputs, (state, cu_seqlens), settings = Inputs(*arguments[:8]), arguments[8:10], Settings(*arguments[10:])
    sequences = inputs.q.shape[0]
    if cu_seqlens is not None:
        is_list = cu_seqlens.dim() == 1 and cu_seqlens.shape[0] > 1
        if not is_list or cu_seqlens.dtype not in (torch.int32, torch.int64) or inputs.q.shape[0] != 1:
            raise EffpassError(
                f"effpass::gated_delta_rule: cu_seqlens is {str(cu_seqlens.dtype).removeprefix('torch.')} "
                f"{tuple(cu_seqlens.shape)} and q {tuple(inputs.q.shape)}",
                hint="cu_seqlens is int32 or int64 [N + 1], and the sequences lie in one row: B = 1",
            )
        sequences = cu_seqlens.shape[0] - 1
    check("gated_delta_rule", inputs, settings, state, sequences, cu_seqlens)
    return inputs, settings, state, cu_seqlens, sequences


def _ends(inputs: Inputs, cu_seqlens: Tensor | None) -> list[int]:
    batch, tokens = inputs.q.shape[:2]
    if cu_seqlens is None:
        return [n * tokens for n in range(batch + 1)]
    ends: list[int] = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in itertools.pairwise(ends)):
        raise EffpassError(
            f"effpass::gated_delta_rule: cu_seqlens is {ends} for {tokens} tokens",
            hint="it rises from 0 to the number of tokens",
        )
    return ends


def _state(inputs: Inputs, given: Tensor | None, sequences: int) -> Tensor:
    if given is not None:
        return given
    wide = torch.promote_types(inputs.q.dtype, torch.float32)
    return inputs.v.new_zeros(sequences, inputs.v.shape[2], inputs.q.shape[3], inputs.v.shape[3], dtype=wide)


def _kernels(inputs: Inputs) -> Any:
    """The module of the kernels, or None if they don't serve these inputs."""
    kernels = triton_kernels("gated_delta_rule") if inputs.q.is_cuda else None
    return kernels if kernels and kernels.supported(inputs) else None


def _pairs(inputs: Inputs, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """P and T of all chunks, which kernels write, uninitialized; without kernels they have no elements."""
    kernels = _kernels(inputs)
    shape = kernels.shape_of_pairs(inputs, cu_seqlens) if kernels else (0,)
    return inputs.q.new_empty(shape), inputs.q.new_empty(shape)


def _gated_delta_rule(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns output, final state, and P and T for the backward pass."""
    inputs, settings, state, cu_seqlens, sequences = _arguments(arguments)
    pairs = _pairs(inputs, cu_seqlens)
    if sequences == 0:
        return inputs.v.new_empty(inputs.v.shape), _state(inputs, None, 0), *pairs
    if kernels := _kernels(inputs):
        return *kernels.forward(inputs, settings, state, cu_seqlens, sequences, pairs), *pairs
    chunks = Chunks.of(_ends(inputs, cu_seqlens)).to(inputs.q.device)
    if not inputs.q.is_cuda:
        check_values("gated_delta_rule", inputs, settings)
    output, final = chunk_forward(prepared(inputs, settings), chunks, _state(inputs, state, sequences))
    return output.to(inputs.v.dtype), final, *pairs


_op = torch.library.custom_op(
    "effpass::gated_delta_rule",
    _gated_delta_rule,
    mutates_args=(),
    schema=f"({_TENSORS}, {_CONSTANTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, _, _, cu_seqlens, sequences = _arguments(arguments)
    return inputs.v.new_empty(inputs.v.shape), _state(inputs, None, sequences), *_pairs(inputs, cu_seqlens)


@register_flop_formula(torch.ops.effpass.gated_delta_rule)
def _(q: Any, k: Any, v: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> Any:
    return _flops(q, v)


def _flops(q: Any, v: Any) -> Any:
    """FLOPs of the recurrence without the decay: S κ, κ Uᵀ and S q̂ for each token and value head."""
    return 6 * v[0] * v[1] * v[2] * q[3] * v[3]


# -- gradients --------------------------------------------------------------------------------------------------------


def _gated_delta_rule_backward(
    output: Tensor,
    scores: Tensor,
    inverses: Tensor,
    d_output: Tensor | None,
    d_state: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs, settings, state, cu_seqlens, sequences = _arguments(arguments)
    initial = _state(inputs, state, sequences)
    if d_output is None:
        d_output = torch.zeros_like(inputs.v)
    found: Any
    if sequences == 0:
        found, d_initial = [None if x is None else x.new_zeros(x.shape) for x in inputs], torch.zeros_like(initial)
    elif kernels := _kernels(inputs):
        found, d_initial = kernels.backward(
            inputs, settings, state, cu_seqlens, sequences, output, (scores, inverses), d_output, d_state
        )
    else:
        chunks = Chunks.of(_ends(inputs, cu_seqlens)).to(inputs.q.device)
        ready = prepared(inputs, settings)
        d_last = torch.zeros_like(initial) if d_state is None else d_state
        gradients, d_initial = chunk_backward(ready, chunks, initial, d_output.to(ready.q.dtype), d_last)
        found = prepared_backward(inputs, settings, Prepared(*gradients))
    none = initial.new_empty(0)
    return (*(none.clone() if x is None else x for x in found), d_initial)  # type: ignore[return-value]


_op_backward = torch.library.custom_op(
    "effpass::gated_delta_rule_backward",
    _gated_delta_rule_backward,
    mutates_args=(),
    schema=f"(Tensor output, Tensor scores, Tensor inverses, Tensor? d_output, Tensor? d_state, {_TENSORS}, "
    f"{_CONSTANTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_op_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, _, _, _, sequences = _arguments(arguments[5:])
    initial = _state(inputs, None, sequences)
    return (*(initial.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs), initial)


@register_flop_formula(torch.ops.effpass.gated_delta_rule_backward)
def _(*arguments: Any, out_val: Any = None, **kwargs: Any) -> Any:
    q, _, v = arguments[5:8]
    return 3 * _flops(q, v)  # recomputed states, and two products for each product of the forward pass


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    attended, _, scores, inverses = output
    ctx.save_for_backward(attended, scores, inverses, *inputs[:10])
    ctx.mark_non_differentiable(scores, inverses)
    ctx.constants = inputs[10:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_output: Tensor | None, d_state: Tensor | None, *of_pairs: None) -> Any:
    if d_output is None and d_state is None:
        return (None,) * 14
    saved = ctx.saved_tensors
    found = torch.ops.effpass.gated_delta_rule_backward(*saved[:3], d_output, d_state, *saved[3:], *ctx.constants)
    asked = ctx.needs_input_grad
    of_tensors = [x if asked[place] else None for place, x in enumerate(found)]
    return (*of_tensors, None, None, None, None, None)


_op.register_autograd(_backward, setup_context=_save)
