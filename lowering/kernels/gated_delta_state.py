"""Triton kernels for the sequential part of the gated delta rule: forward and backward pass over a sequence's chunks.

    U = T (ζ − B̃ S₀)      O = Q̃ S₀ + P U      S_C = e^(G_C) ⊙ S₀ + Ãᵀ U              with T = (I + L)⁻¹

Names are those of :mod:`effpass.lowering.ops.gated_delta_rule_chunks`. One program handles BV value channels of one
value head of one sequence, and carries their columns of the state in float32. It holds the state transposed, as
Sᵀ [BV, K], so that the left operand of each product is the result of the product before, still in registers, and shared
memory only serves loads. Operands of products are rounded to the dtype of q; products accumulate in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effpass.lowering.kernels.gated_delta_inputs import C, root

__all__ = ["state_backward", "state_forward"]


@triton.jit
def _lane(HV, BLOCKS: tl.constexpr, BV: tl.constexpr):
    """Sequence, value head (int64), their number among all (int64) and first column of a program."""
    lane, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    return lane // HV, (lane % HV).to(tl.int64), lane.to(tl.int64), block * BV


@triton.jit
def _sequence(first_chunks, cu_seqlens, n, T, VARLEN: tl.constexpr):
    """First chunk, first token (int64) and number of tokens of a sequence."""
    if VARLEN:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        return tl.load(first_chunks + n), start, (tl.load(cu_seqlens + n + 1) - start).to(tl.int32)
    else:
        return n * tl.cdiv(T, C), n.to(tl.int64) * T, T


@triton.jit
def state_forward(
    q_in, k_in, k_out, scores, inverses, decay, strengths, v, beta, initial, output, final, befores, changes,
    first_chunks, cu_seqlens, T, HV, v_t, v_h, beta_t, beta_h, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr,
    VP: tl.constexpr, BV: tl.constexpr, SCALAR_BETA: tl.constexpr, LOGITS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    VARLEN: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Output and last state; with KEEP the transposed state before each chunk and U instead.

    `beta` is that of the values: a vector, or a head's `strengths` with SCALAR_BETA.
    """
    n, head, lane, first = _lane(HV, VP // BV, BV)
    chunk, start, tokens = _sequence(first_chunks, cu_seqlens, n, T, VARLEN)
    DTYPE: tl.constexpr = k_in.dtype.element_ty
    r, rk, rv = tl.arange(0, C), tl.arange(0, KP), first + tl.arange(0, BV)
    of_state = lane * K * V + rk[None, :] * V + rv[:, None]
    is_state = (rk < K)[None, :] & (rv < V)[:, None]
    if HAS_INITIAL:
        state = tl.load(initial + of_state, mask=is_state, other=0)
    else:
        state = tl.zeros((BV, KP), tl.float32)
    by_key, square = r[:, None] * KP + rk, r[:, None] * C + r
    v += start * v_t + head * v_h + rv[:, None]
    beta += start * beta_t + head * beta_h + rv[:, None]
    output += (start * HV + head) * V + rv[:, None]
    for number in tl.range(0, tl.cdiv(tokens, C), num_stages=STAGES):
        here = (chunk + number).to(tl.int64) * HV + head
        t = number * C + r[None, :]
        there = (t < tokens) & (rv < V)[:, None]
        before = state.to(DTYPE)
        if KEEP:
            tl.store(befores + here * KP * VP + rv[:, None] * KP + rk, before)
        value = tl.load(v + t.to(tl.int64) * v_t, mask=there, other=0).to(tl.float32)
        if SCALAR_BETA:
            value *= tl.load(strengths + here * C + r)[None, :]
        else:
            value *= root(tl.load(beta + t.to(tl.int64) * beta_t, mask=there, other=0).to(tl.float32), LOGITS)
        entering, leaving = tl.load(k_in + here * C * KP + by_key), tl.load(k_out + here * C * KP + by_key)
        inverse = tl.load(inverses + here * C * C + square)
        rest = (value - tl.dot(before, tl.trans(entering), input_precision=PRECISION)).to(DTYPE)
        change = tl.dot(rest, tl.trans(inverse), input_precision=PRECISION).to(DTYPE)
        if KEEP:
            tl.store(changes + here * C * VP + r[None, :] * VP + rv[:, None], change)
        else:
            query, score = tl.load(q_in + here * C * KP + by_key), tl.load(scores + here * C * C + square)
            out = tl.dot(before, tl.trans(query), input_precision=PRECISION)
            out = tl.dot(change, tl.trans(score), out, input_precision=PRECISION)
            tl.store(output + t.to(tl.int64) * HV * V, out.to(DTYPE), mask=there)
        state *= tl.load(decay + here * KP + rk)[None, :]
        state = tl.dot(change, leaving, state, input_precision=PRECISION)
    if not KEEP:
        tl.store(final + of_state, state, mask=is_state)


@triton.jit
def state_backward(
    q_in, k_in, k_out, scores, inverses, decay, d_output, d_final, d_values, d_afters, d_initial, first_chunks,
    cu_seqlens, T, HV, out_t, out_h, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    BV: tl.constexpr, HAS_FINAL: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first: dζ, the transposed gradient of the state after each chunk, and of the initial.

    dU = Pᵀ dO + Ã dS; dζ = Tᵀ dU; dS ← e^(G_C) ⊙ dS + Q̃ᵀ dO − B̃ᵀ dζ.
    """
    n, head, lane, first = _lane(HV, VP // BV, BV)
    chunk, start, tokens = _sequence(first_chunks, cu_seqlens, n, T, VARLEN)
    DTYPE: tl.constexpr = k_in.dtype.element_ty
    r, rk, rv = tl.arange(0, C), tl.arange(0, KP), first + tl.arange(0, BV)
    of_state = lane * K * V + rk[None, :] * V + rv[:, None]
    is_state = (rk < K)[None, :] & (rv < V)[:, None]
    if HAS_FINAL:
        state = tl.load(d_final + of_state, mask=is_state, other=0)
    else:
        state = tl.zeros((BV, KP), tl.float32)
    by_key, square = r[:, None] * KP + rk, r[:, None] * C + r
    d_output += start * out_t + head * out_h + rv[:, None]
    chunks = tl.cdiv(tokens, C)
    for place in tl.range(0, chunks, num_stages=STAGES):
        number = chunks - 1 - place
        here = (chunk + number).to(tl.int64) * HV + head
        t = number * C + r[None, :]
        after = state.to(DTYPE)
        tl.store(d_afters + here * KP * VP + rv[:, None] * KP + rk, after)
        there = (t < tokens) & (rv < V)[:, None]
        out = tl.load(d_output + t.to(tl.int64) * out_t, mask=there, other=0).to(DTYPE)
        entering, leaving = tl.load(k_in + here * C * KP + by_key), tl.load(k_out + here * C * KP + by_key)
        score, inverse = tl.load(scores + here * C * C + square), tl.load(inverses + here * C * C + square)
        change = tl.dot(after, tl.trans(leaving), input_precision=PRECISION)
        change = tl.dot(out, score, change, input_precision=PRECISION).to(DTYPE)
        value = tl.dot(change, inverse, input_precision=PRECISION)
        tl.store(d_values + here * C * VP + r[None, :] * VP + rv[:, None], value.to(DTYPE))
        state *= tl.load(decay + here * KP + rk)[None, :]
        state = tl.dot(out, tl.load(q_in + here * C * KP + by_key), state, input_precision=PRECISION)
        state = tl.dot((-value).to(DTYPE), entering, state, input_precision=PRECISION)
    tl.store(d_initial + of_state, state, mask=is_state)
