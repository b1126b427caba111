"""Triton kernels for the sequential part of the gated delta rule: forward and backward pass over a sequence's chunks.

    U = T (ζ − B̃ S₀)      O = Q̃ S₀ + P U      S_C = e^(G_C) ⊙ S₀ + Ãᵀ U              with T = (I + L)⁻¹

Names are those of :mod:`effpass.lowering.ops.gated_delta_rule_chunks`. One program handles BV value channels of one
value head of one segment, and carries their columns of the state in float32. It holds the state transposed, as
Sᵀ [BV, K], so that the left operand of each product is the result of the product before, still in registers, and shared
memory only serves loads. Operands of products are rounded to the dtype of q; products accumulate in float32.

A segment is a part of a sequence, in whole chunks: if sequences and heads alone don't fill the device, each sequence is
divided into segments that run side by side. The state after a segment is affine in the state before it:

    S′ = M S + N        dS = Mᵀ dS′ + D

Launches in mode "map" compute N from the state 0, M from the state I without values, and D; `join` computes from them
the states between the segments, with which the segments run as sequences do. The first segment's N is its last state,
and the last segment's D the gradient of its initial state, so that M is needed of neither.

Launches in mode "probe" find segments whose last few chunks (for D: the first few) take every state to 0 in float32.
Then M is 0, and only these chunks are run through for N or D.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effpass.lowering.kernels.gated_delta_inputs import C, root

__all__ = ["join", "state_backward", "state_forward"]


@triton.jit
def _lane(HV, BLOCKS: tl.constexpr, BV: tl.constexpr):
    """Segment, value head (int64), their number among all (int64) and first column of a program."""
    lane, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    return lane // HV, (lane % HV).to(tl.int64), lane.to(tl.int64), block * BV


@triton.jit
def _segment(first_chunks, cu_seqlens, number, T, SEGMENTS, VARLEN: tl.constexpr):
    """A segment by its number among all: its number within its sequence, first chunk, first token (int64), tokens."""
    n, segment = number // SEGMENTS, number % SEGMENTS
    if VARLEN:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        chunk, tokens = tl.load(first_chunks + n), (tl.load(cu_seqlens + n + 1) - start).to(tl.int32)
    else:
        chunk, start, tokens = n * tl.cdiv(T, C), n.to(tl.int64) * T, T
    each = tl.cdiv(tl.cdiv(tokens, C), SEGMENTS)
    before = segment * each
    tokens = tl.maximum(tl.minimum(tokens - before * C, each * C), 0)
    return segment, chunk + before, start + before * C, tokens


@triton.jit
def _has_faded(faded, lane, BLOCKS: tl.constexpr):
    """Whether all programs of a launch in mode "probe" saw the state fade."""
    return tl.min(tl.load(faded + lane * BLOCKS + tl.arange(0, BLOCKS)), 0) != 0


@triton.jit
def _of_tokens(pointer, t, stride, is_value, tokens):
    """Channels of tokens t; zeros after the last token."""
    return tl.load(pointer + t.to(tl.int64) * stride, mask=is_value & (t < tokens), other=0)


@triton.jit
def state_forward(
    q_in, k_in, k_out, scores, inverses, decay, strengths, v, beta, initial, output, final, befores, changes, maps,
    faded, first_chunks, cu_seqlens, T, SEGMENTS, HV, v_t, v_h, beta_t, beta_h, K: tl.constexpr, V: tl.constexpr,
    KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, SCALAR_BETA: tl.constexpr, LOGITS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, PROBED: tl.constexpr, AT_START: tl.constexpr, VARLEN: tl.constexpr, MODE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Output and last state; in mode "keep" the transposed state before each chunk and U; in mode "map" Nᵀ above Mᵀ.

    In mode "probe", whether the last PROBED chunks, or with AT_START the first ones, take rows of the state I to 0.
    `beta` is that of the values: a vector, or a head's `strengths` with SCALAR_BETA. In mode "map" the initial states
    are those of sequences, otherwise those of segments.
    """
    ROWS: tl.constexpr = VP + KP if MODE == "map" else KP if MODE == "probe" else VP
    number, head, lane, first = _lane(HV, ROWS // BV, BV)
    segment, chunk, start, tokens = _segment(first_chunks, cu_seqlens, number, T, SEGMENTS, VARLEN)
    DTYPE: tl.constexpr = k_in.dtype.element_ty
    r, rk, rv = tl.arange(0, C), tl.arange(0, KP), first + tl.arange(0, BV)
    of_state = lane * K * V + rk[None, :] * V + rv[:, None]
    is_state = (rk < K)[None, :] & (rv < V)[:, None]
    chunks, begin = tl.cdiv(tokens, C), 0
    if MODE == "map":
        if segment == SEGMENTS - 1 or (segment == 0 and first >= VP):
            return
        if PROBED > 0:
            has_faded = _has_faded(faded, lane, KP // BV)
            if has_faded and first >= VP:
                return
            begin = tl.where(has_faded, tl.maximum(chunks - PROBED, 0), 0)
        # Rows from VP on are those of I, without values.
        state = tl.where((rv[:, None] - VP == rk[None, :]) & (rk < K)[None, :], 1.0, 0.0)
        if HAS_INITIAL:
            of_first = (number // SEGMENTS * HV + head) * K * V + rk[None, :] * V + rv[:, None]
            state += tl.load(initial + of_first, mask=is_state & (segment == 0), other=0)
    elif MODE == "probe":
        if AT_START:
            chunks = tl.minimum(chunks, PROBED)
        else:
            begin = tl.maximum(chunks - PROBED, 0)
        state = tl.where((rv[:, None] == rk[None, :]) & (rk < K)[None, :], 1.0, 0.0)
    elif HAS_INITIAL:
        state = tl.load(initial + of_state, mask=is_state, other=0)
    else:
        state = tl.zeros((BV, KP), tl.float32)
    by_key, square = r[:, None] * KP + rk, r[:, None] * C + r
    v += start * v_t + head * v_h + rv[:, None]
    beta += start * beta_t + head * beta_h + rv[:, None]
    output += (start * HV + head) * V + rv[:, None]
    # With AHEAD values are loaded one chunk ahead; the compiler does so only for what a product takes as it is loaded.
    is_value = (rv < (0 if MODE == "probe" else V))[:, None]
    if AHEAD:
        t = r[None, :] + begin * C
        raw = _of_tokens(v, t, v_t, is_value, tokens)
        if not SCALAR_BETA:
            logits = _of_tokens(beta, t, beta_t, is_value, tokens)
    for place in tl.range(begin, chunks, num_stages=STAGES):
        here = (chunk + place).to(tl.int64) * HV + head
        t = place * C + r[None, :]
        before = state.to(DTYPE)
        if MODE == "keep":
            tl.store(befores + here * KP * VP + rv[:, None] * KP + rk, before)
        if not AHEAD:
            raw = _of_tokens(v, t, v_t, is_value, tokens)
        value = raw.to(tl.float32)
        if AHEAD:
            raw = _of_tokens(v, t + C, v_t, is_value, tokens)
        if SCALAR_BETA:
            value *= tl.load(strengths + here * C + r)[None, :]
        else:
            if not AHEAD:
                logits = _of_tokens(beta, t, beta_t, is_value, tokens)
            value *= root(logits.to(tl.float32), LOGITS)
            if AHEAD:
                logits = _of_tokens(beta, t + C, beta_t, is_value, tokens)
        entering, leaving = tl.load(k_in + here * C * KP + by_key), tl.load(k_out + here * C * KP + by_key)
        inverse = tl.load(inverses + here * C * C + square)
        rest = (value - tl.dot(before, tl.trans(entering), input_precision=PRECISION)).to(DTYPE)
        change = tl.dot(rest, tl.trans(inverse), input_precision=PRECISION).to(DTYPE)
        if MODE == "keep":
            tl.store(changes + here * C * VP + r[None, :] * VP + rv[:, None], change)
        elif MODE == "output":
            query, score = tl.load(q_in + here * C * KP + by_key), tl.load(scores + here * C * C + square)
            out = tl.dot(before, tl.trans(query), input_precision=PRECISION)
            out = tl.dot(change, tl.trans(score), out, input_precision=PRECISION)
            tl.store(output + t.to(tl.int64) * HV * V, out.to(DTYPE), mask=is_value & (t < tokens))
        state *= tl.load(decay + here * KP + rk)[None, :]
        state = tl.dot(change, leaving, state, input_precision=PRECISION)
    if MODE == "output":
        of_last = (number // SEGMENTS * HV + head) * K * V + rk[None, :] * V + rv[:, None]
        tl.store(final + of_last, state, mask=is_state & (segment == SEGMENTS - 1))
    elif MODE == "map":
        tl.store(maps + (lane * (VP + KP) + rv[:, None]) * KP + rk[None, :], state)
    elif MODE == "probe":
        tl.store(faded + tl.program_id(0), (tl.sum(tl.sum((state != 0).to(tl.int32), 1), 0) == 0).to(tl.int8))


@triton.jit
def state_backward(
    q_in, k_in, k_out, scores, inverses, decay, d_output, d_final, d_values, d_afters, d_initial, maps, faded,
    first_chunks, cu_seqlens, T, SEGMENTS, HV, out_t, out_h, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr,
    VP: tl.constexpr, BV: tl.constexpr, HAS_FINAL: tl.constexpr, PROBED: tl.constexpr, VARLEN: tl.constexpr,
    MODE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first: dζ, the transposed gradient of the state after each chunk, and of the initial.

    dU = Pᵀ dO + Ã dS; dζ = Tᵀ dU; dS ← e^(G_C) ⊙ dS + Q̃ᵀ dO − B̃ᵀ dζ. In mode "map" Dᵀ instead, in the place of Nᵀ.
    The gradients of final states are those of sequences in mode "map", otherwise those of segments.
    """
    number, head, lane, first = _lane(HV, VP // BV, BV)
    segment, chunk, start, tokens = _segment(first_chunks, cu_seqlens, number, T, SEGMENTS, VARLEN)
    DTYPE: tl.constexpr = k_in.dtype.element_ty
    r, rk, rv = tl.arange(0, C), tl.arange(0, KP), first + tl.arange(0, BV)
    of_state = lane * K * V + rk[None, :] * V + rv[:, None]
    is_state = (rk < K)[None, :] & (rv < V)[:, None]
    chunks = tl.cdiv(tokens, C)
    if MODE == "map":
        if segment == 0:
            return
        if PROBED > 0:
            chunks = tl.where(_has_faded(faded, lane, KP // BV), tl.minimum(chunks, PROBED), chunks)
        state = tl.zeros((BV, KP), tl.float32)
        if HAS_FINAL:
            of_last = (number // SEGMENTS * HV + head) * K * V + rk[None, :] * V + rv[:, None]
            state = tl.load(d_final + of_last, mask=is_state & (segment == SEGMENTS - 1), other=0)
    elif HAS_FINAL:
        state = tl.load(d_final + of_state, mask=is_state, other=0)
    else:
        state = tl.zeros((BV, KP), tl.float32)
    by_key, square = r[:, None] * KP + rk, r[:, None] * C + r
    d_output += start * out_t + head * out_h + rv[:, None]
    for place in tl.range(0, chunks, num_stages=STAGES):
        at = chunks - 1 - place
        here = (chunk + at).to(tl.int64) * HV + head
        t = at * C + r[None, :]
        after = state.to(DTYPE)
        if MODE == "keep":
            tl.store(d_afters + here * KP * VP + rv[:, None] * KP + rk, after)
        there = (t < tokens) & (rv < V)[:, None]
        out = tl.load(d_output + t.to(tl.int64) * out_t, mask=there, other=0).to(DTYPE)
        entering, leaving = tl.load(k_in + here * C * KP + by_key), tl.load(k_out + here * C * KP + by_key)
        score, inverse = tl.load(scores + here * C * C + square), tl.load(inverses + here * C * C + square)
        change = tl.dot(after, tl.trans(leaving), input_precision=PRECISION)
        change = tl.dot(out, score, change, input_precision=PRECISION).to(DTYPE)
        value = tl.dot(change, inverse, input_precision=PRECISION)
        if MODE == "keep":
            tl.store(d_values + here * C * VP + r[None, :] * VP + rv[:, None], value.to(DTYPE))
        state *= tl.load(decay + here * KP + rk)[None, :]
        state = tl.dot(out, tl.load(q_in + here * C * KP + by_key), state, input_precision=PRECISION)
        state = tl.dot((-value).to(DTYPE), entering, state, input_precision=PRECISION)
    if MODE == "keep":
        of_first = (number // SEGMENTS * HV + head) * K * V + rk[None, :] * V + rv[:, None]
        tl.store(d_initial + of_first, state, mask=is_state & (segment == 0))
    else:
        tl.store(maps + (lane * (VP + KP) + rv[:, None]) * KP + rk[None, :], state)


@triton.jit
def join(
    maps, faded, given, states, SEGMENTS, HV, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    BV: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr, HAS_GIVEN: tl.constexpr, PROBED: tl.constexpr,
    BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States before all segments [N, SEGMENTS, HV, K, V] from that before the first; BACKWARD: gradients after them.

    One program handles BV value channels of one value head of one sequence. It reads the state before in blocks of BK
    key channels, from where it has just written it.
    """
    n, head, lane, first = _lane(HV, VP // BV, BV)
    rk, rv, rb = tl.arange(0, KP), first + tl.arange(0, BV), tl.arange(0, BK)
    by_state, is_state = rk[None, :] * V + rv[:, None], (rk < K)[None, :] & (rv < V)[:, None]
    if HAS_GIVEN:
        state = tl.load(given + lane * K * V + by_state, mask=is_state, other=0)
    else:
        state = tl.zeros((BV, KP), tl.float32)
    n = n.to(tl.int64) * SEGMENTS
    here = (n + (SEGMENTS - 1 if BACKWARD else 0)) * HV + head
    tl.store(states + here * K * V + by_state, state, mask=is_state)
    for step in range(1, SEGMENTS):
        tl.debug_barrier()
        before, of_values = states + here * K * V + rv[:, None], maps + here * (VP + KP) * KP
        state = tl.load(of_values + rv[:, None] * KP + rk[None, :])
        size = 0 if step == 1 else KP
        if PROBED > 0:
            size = tl.where(_has_faded(faded, here, BLOCKS), 0, size)
        for block in range(0, size, BK):
            kb = block + rb
            part = tl.load(before + kb[None, :] * V, mask=(kb < K)[None, :] & (rv < V)[:, None], other=0)
            if BACKWARD:
                matrix = tl.load(of_values + (VP + rk[None, :]) * KP + kb[:, None])
            else:
                matrix = tl.load(of_values + (VP + kb[:, None]) * KP + rk[None, :])
            state = tl.dot(part, matrix, state, input_precision=PRECISION)
        here += -HV if BACKWARD else HV
        tl.store(states + here * K * V + by_state, state, mask=is_state)
