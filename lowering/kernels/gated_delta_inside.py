"""Triton kernel for what the chunks of the gated delta rule compute without the state: Q̃, B̃, Ã, P and T.

    L_ij = Σ_d κ_id κ_jd e^(G_id − G_jd)  (j < i)    P_ij = Σ_d q̂_id κ_jd e^(G_id − G_jd)  (j ≤ i)    T = (I + L)⁻¹
    B̃ = κ ⊙ e^G      Q̃ = q̂ ⊙ e^G      Ã = κ ⊙ e^(G_C − G)

Names are those of :mod:`effpass.lowering.ops.gated_delta_rule_chunks`. One program handles one chunk of a value head,
in blocks of BK channels. The sums over channels for L and P are float32 and stay in registers: 64 a thread, so that
three programs of four warps fit a multiprocessor. In a mild chunk, earlier tokens' factors are split into those of the
earlier and of the later half of the chunk, since a later token's factor differs between both. The decay of the whole
chunk and √β are written in float32, everything else in the dtype of q.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effpass.lowering.kernels.gated_delta_inputs import (
    BEYOND,
    BLOCK,
    HALVES,
    JOINED,
    LEAST,
    MIDDLE,
    SIXTY_FOUR,
    UPTO,
    C,
    column,
    distance,
    exponents,
    gate_addends,
    gate_column,
    inverse_norm,
    matrix,
    place,
    raw_tile,
    root,
    steepness,
    sums_between,
    sums_beyond,
    tile,
)

__all__ = ["inside"]


@triton.jit
def _inverse(lower, INVERSE: tl.constexpr):
    """(I + L)⁻¹ of a strictly lower triangle: from the inverses of the halves, X − X (L between the halves) X.

    With keys of norm 1 no entry exceeds the larger β, which float16 holds with the digits of TF32.
    """
    apart = distance()
    x = tl.where(apart == 0, 1.0, 0.0) - tl.where(apart == 1, lower, 0)
    if INVERSE == "float16":
        half_lower = lower.to(tl.float16)
        for level in tl.static_range(1, 6):
            half = x.to(tl.float16)
            between = tl.dot(tl.where((apart >> level) == 1, half_lower, 0), half)
            x -= tl.dot(half, between.to(tl.float16))
    else:
        for level in tl.static_range(1, 6):
            between = tl.dot(tl.where((apart >> level) == 1, lower, 0), x, input_precision=INVERSE)
            x -= tl.dot(x, between, input_precision=INVERSE)
    return x


@triton.jit
def _by_levels(key, query, added, matrices, of_keys, of_queries, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Sums of pairs with one more block of channels of a steep chunk."""
    EXACT: tl.constexpr = tl.float32 == DTYPE
    apart = distance()
    new_keys, new_queries = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    for level in range(0, HALVES + 1):
        decay = tl.exp2(exponents(matrix(matrices, level), added, EXACT))
        decayed = (key * decay).to(DTYPE)
        columns = tl.trans(decayed)
        is_pair = (apart >> level) == 1
        found = tl.dot(decayed, columns, input_precision=PRECISION)
        new_keys = tl.where(is_pair, found, new_keys)
        found = tl.dot((query * decay).to(DTYPE), columns, input_precision=PRECISION)
        new_queries = tl.where(is_pair, found, new_queries)
    new_queries = tl.where(apart == 0, tl.sum(query * key, 1)[:, None], new_queries)
    return of_keys + new_keys, of_queries + new_queries


@triton.jit
def inside(
    q, k, gate, beta, A_log, dt_bias, places, matrices, steep, q_in, k_in, k_out, scores, inverses, decay, strengths,
    norms, marks, T, HV, q_t, q_h, k_t, k_h, gate_t, gate_h, beta_t, beta_h, scale, lower_bound, GROUP: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, SCALAR_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr, SCALAR_BETA: tl.constexpr, NORMALIZE: tl.constexpr, LOGITS: tl.constexpr,
    VARLEN: tl.constexpr, RANGE: tl.constexpr, PRECISION: tl.constexpr, INVERSE: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """The forward pass keeps P and T; for the backward pass, norms and `marks` are written instead of them."""
    chunk, head = tl.program_id(0) // HV, (tl.program_id(0) % HV).to(tl.int64)
    start, rows = place(places, chunk, T, VARLEN)
    if rows <= 0:
        return
    DTYPE: tl.constexpr = q_in.dtype.element_ty
    EXACT: tl.constexpr = tl.float32 == DTYPE
    MILD: tl.constexpr = RANGE == "mild" or RANGE == "mild only"
    here = tl.program_id(0).to(tl.int64)
    r, rk = tl.arange(0, C), tl.arange(0, BK)
    q += start * q_t + head // GROUP * q_h
    k += start * k_t + head // GROUP * k_h
    gate += start * gate_t + head * gate_h
    beta += start * beta_t + head * beta_h
    rate = tl.exp(tl.load(A_log + head).to(tl.float32)) if GATE != "log" else 1.0
    if RANGE == "mild only":
        is_steep = steepness(gate, gate_t, rows, rate, dt_bias + head * K, lower_bound, K, BK, GATE, HAS_BIAS)
        tl.store(steep + here, is_steep)
        if is_steep != 0:
            return
    if RANGE == "steep only":  # noqa: SIM102  (resolved when the kernel is compiled)
        if tl.load(steep + here) == 0:
            return
    if not SCALAR_GATE:
        upto, beyond = matrix(matrices, UPTO), matrix(matrices, BEYOND)
        if MILD and not BACKWARD:
            middle, joined = matrix(matrices, MIDDLE), matrix(matrices, JOINED)
    q_scale, k_scale = tl.full((C,), 1.0, tl.float32) * scale, tl.full((C,), 1.0, tl.float32)
    if NORMALIZE:
        q_norm, k_norm = inverse_norm(q, q_t, rows, K, BK), inverse_norm(k, k_t, rows, K, BK)
        if BACKWARD:
            tl.store(norms + here * 2 * C + r, q_norm)
            tl.store(norms + here * 2 * C + C + r, k_norm)
        q_scale *= q_norm
        k_scale *= k_norm
    if SCALAR_BETA:
        strength = root(column(beta, beta_t, rows), LOGITS)
        tl.store(strengths + here * C + r, strength)
        k_scale *= strength
    of_keys, of_queries = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    if SCALAR_GATE:
        _, g = gate_column(gate, gate_t, rows, rate, dt_bias + head, lower_bound, GATE, HAS_BIAS)
        from_begin, to_end = tl.exp2(tl.cumsum(g, 0))[:, None], tl.exp2(sums_beyond(g))[:, None]
        whole = tl.exp2(tl.zeros((BK,), tl.float32) + tl.sum(g, 0))
    else:
        is_token = tl.where(r < rows, 1.0, 0.0)[:, None]
        if MILD and not BACKWARD:
            early_half = tl.where(r < C // 2, 1.0, 0.0)[:, None]
            late_half = 1 - early_half
    for first in range(0, KP, BK):
        raw_key, raw_query = raw_tile(k, k_t, rows, first, K, BK), raw_tile(q, q_t, rows, first, K, BK)
        if not SCALAR_BETA:
            raw_beta = raw_tile(beta, beta_t, rows, first, K, BK)
        if not SCALAR_GATE:
            raw, bias = tile(gate, gate_t, rows, first, K, BK), 0.0
            if HAS_BIAS:
                bias = tl.load(dt_bias + head * K + first + rk, mask=first + rk < K, other=0).to(tl.float32)[None, :]
            added = gate_addends(raw, bias, rate, is_token, lower_bound, GATE)
            if K != KP:
                added = tl.where((first + rk < K)[None, :], added, 0)
            if not MILD:
                added = tl.maximum(added, SIXTY_FOUR * LEAST)
        key = raw_key.to(tl.float32) * k_scale[:, None]
        if not SCALAR_BETA:
            key *= root(raw_beta.to(tl.float32), LOGITS)
        at = here * C * KP + r[:, None] * KP + first + rk
        if not SCALAR_GATE:
            to_end = tl.exp2(exponents(beyond, added, EXACT))
        tl.store(k_out + at, (key * to_end).to(DTYPE))
        query = raw_query.to(tl.float32) * q_scale[:, None]
        if SCALAR_GATE:
            if not BACKWARD:
                keys = key.to(DTYPE)
                columns = tl.trans(keys)
                of_keys = tl.dot(keys, columns, of_keys, input_precision=PRECISION)
                of_queries = tl.dot(query.to(DTYPE), columns, of_queries, input_precision=PRECISION)
            tl.store(decay + here * KP + first + rk, whole)
        else:
            if MILD and not BACKWARD:
                exponent = exponents(middle, added, EXACT)
                of_column, late = key * tl.exp2(-exponent), tl.exp2(exponent)
                # Two products: a difference would be fused into a multiply-add, which keeps what rounding left of the
                # earlier half, and the factors of later tokens magnify that.
                of_early = tl.trans((of_column * early_half).to(DTYPE))
                of_late = tl.trans((of_column * late_half).to(DTYPE))
                of_keys = tl.dot((key * late).to(DTYPE), of_late, of_keys, input_precision=PRECISION)
                of_queries = tl.dot((query * late).to(DTYPE), of_late, of_queries, input_precision=PRECISION)
                across = tl.exp2(exponents(joined, added, EXACT))
                of_keys = tl.dot((key * across).to(DTYPE), of_early, of_keys, input_precision=PRECISION)
                of_queries = tl.dot((query * across).to(DTYPE), of_early, of_queries, input_precision=PRECISION)
            elif not BACKWARD:
                of_keys, of_queries = _by_levels(key, query, added, matrices, of_keys, of_queries, DTYPE, PRECISION)
            exponent = exponents(upto, added, EXACT)
            if BACKWARD:
                of_mark = (here * 4 + r[:, None] // BLOCK) * KP + first + rk[None, :]
                tl.store(marks + of_mark, exponent, mask=(r % BLOCK == BLOCK - 1)[:, None] & (rk >= 0)[None, :])
            from_begin = tl.exp2(exponent)
            # The last row: after tokens that do not exist, it is that of the last one that does.
            of_last = here * KP + first + rk[None, :] + r[:, None] * 0
            tl.store(decay + of_last, from_begin, mask=(r == C - 1)[:, None] & (rk >= 0)[None, :])
        tl.store(q_in + at, (query * from_begin).to(DTYPE))
        tl.store(k_in + at, (key * from_begin).to(DTYPE))
    if not BACKWARD:
        i, j = r[:, None], r[None, :]
        if SCALAR_GATE:
            of_pairs = tl.exp2(sums_between(g))
            of_keys, of_queries = of_keys * of_pairs, of_queries * of_pairs
        square = here * C * C + i * C + j
        tl.store(scores + square, tl.where(i >= j, of_queries, 0).to(DTYPE))
        tl.store(inverses + square, _inverse(tl.where(i > j, of_keys, 0), INVERSE).to(DTYPE))
