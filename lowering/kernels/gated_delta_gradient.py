"""Triton kernel for the gradients of the gated delta rule's inputs, from those of ζ and of the states; for all chunks.

One program handles one chunk of a value head and recomputes q̂, κ, g and the decays. Names are those of
:mod:`effpass.lowering.ops.gated_delta_rule_chunks`; dS is the gradient of the state after the chunk. Tiles are
transposed, [BK, C], so that the C × C gradients of L and P, with which every block of channels is multiplied, lie in
shared memory. Operands of products are rounded to the dtype of q; products and sums accumulate in float32. Gradients of
A_log and dt_bias are written per chunk, and the launcher adds them up.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from effpass.lowering.kernels.gated_delta_inputs import (
    BEYOND,
    HALVES,
    MIDDLE,
    UPTO,
    C,
    addends,
    column,
    distance,
    exponents,
    gate_column,
    gate_tile,
    inverse_norm,
    matrix,
    place,
    raw_tile,
    root,
    root_gradient,
    sums_between,
    sums_beyond,
    tile,
)

__all__ = ["gradient"]

_LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _of_gate(raw, g, d_g, rate, lower_bound, GATE: tl.constexpr):
    """Gradient of the raw gate, and of A_log before the sum over tokens and channels; g is of base 2, d_g of base e."""
    if GATE == "softplus":
        return -rate * d_g / (1 + tl.exp(-raw)), g * _LN_2 * d_g
    elif GATE == "bounded":
        g *= _LN_2
        of_raw = rate * g * (1 - g / lower_bound) * d_g
        return of_raw, raw * of_raw
    else:
        return d_g, d_g


@triton.jit
def _level(key, query, late, early, lower, scores, d_query, d_key, d_sums, PRECISION: tl.constexpr):
    """The gradients with what pairs of tokens give that decay by `late` to the later and from the earlier by `early`.

    What a pair adds to the sum of g at the later token it takes from that at the earlier. Both are computed from the
    same rounded factors, so that they cancel in all tokens before.
    """
    DTYPE: tl.constexpr = lower.dtype
    keys, late_keys, queries = (key * early).to(DTYPE), (key * late).to(DTYPE), (query * late).to(DTYPE)
    of_rows = tl.dot(keys, tl.trans(lower), input_precision=PRECISION)
    of_queries = tl.dot(keys, tl.trans(scores), input_precision=PRECISION)
    of_columns = tl.dot(late_keys, lower, input_precision=PRECISION)
    of_columns = tl.dot(queries, scores, of_columns, input_precision=PRECISION)
    d_sums += late_keys.to(tl.float32) * of_rows + queries.to(tl.float32) * of_queries
    d_sums -= keys.to(tl.float32) * of_columns
    return d_query + of_queries * late, d_key + of_rows * late + of_columns * early, d_sums


@triton.jit
def _suffix_sums(x, upto, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """Sums over the tokens from each on; x [BK, C]. In two pieces, since terms cancel: 2^-17 of their size is lost."""
    later = upto.to(tl.float32) * 64
    if EXACT:
        return tl.dot(x, later, input_precision=PRECISION)
    else:
        later, high = later.to(tl.bfloat16), x.to(tl.bfloat16)
        return tl.dot((x - high.to(tl.float32)).to(tl.bfloat16), later, tl.dot(high, later))


@triton.jit
def gradient(
    q, k, v, gate, beta, write_beta, A_log, dt_bias, places, matrices, steep, changes, d_values, befores, d_afters,
    d_output, d_q, d_k, d_v, d_gate, d_beta, d_write, d_rates, d_biases, T, HV, q_t, q_h, k_t, k_h, v_t, v_h, gate_t,
    gate_h, beta_t, beta_h, write_t, write_h, out_t, out_h, scale, lower_bound, GROUP: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, GATE: tl.constexpr,
    SCALAR_GATE: tl.constexpr, HAS_BIAS: tl.constexpr, SCALAR_BETA: tl.constexpr, HAS_WRITE: tl.constexpr,
    NORMALIZE: tl.constexpr, LOGITS: tl.constexpr, VARLEN: tl.constexpr, RANGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0) // HV, (tl.program_id(0) % HV).to(tl.int64)
    start, rows = place(places, chunk, T, VARLEN)
    if rows <= 0:
        return
    DTYPE: tl.constexpr = changes.dtype.element_ty
    EXACT: tl.constexpr = tl.float32 == DTYPE
    here = tl.program_id(0).to(tl.int64)
    if RANGE == "mild only":  # noqa: SIM102  (resolved when the kernel is compiled)
        if tl.load(steep + here) != 0:
            return
    if RANGE == "steep only":  # noqa: SIM102  (resolved when the kernel is compiled)
        if tl.load(steep + here) == 0:
            return
    r, rk, rv = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
    i, j = r[:, None], r[None, :]
    q += start * q_t + head // GROUP * q_h
    k += start * k_t + head // GROUP * k_h
    v += start * v_t + head * v_h
    gate += start * gate_t + head * gate_h
    beta += start * beta_t + head * beta_h
    write_beta += start * write_t + head * write_h
    d_output += start * out_t + head * out_h
    changes += here * C * VP
    d_values += here * C * VP
    befores += here * KP * VP
    d_afters += here * KP * VP
    d_q += (start * HV + head) * K
    d_k += (start * HV + head) * K
    d_v += (start * HV + head) * V
    d_write += (start * HV + head) * V
    rate = tl.exp(tl.load(A_log + head).to(tl.float32)) if GATE != "log" else 1.0
    q_norm, k_norm = tl.full((C,), 1.0, tl.float32), tl.full((C,), 1.0, tl.float32)
    if NORMALIZE:
        q_norm = inverse_norm(q, q_t, rows, K, BK)
        k_norm = inverse_norm(k, k_t, rows, K, BK)
    if SCALAR_BETA:
        strength = column(beta, beta_t, rows)
        erase = root(strength, LOGITS)
        of_beta = tl.zeros((C,), tl.float32)

    d_lower, d_scores = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    for first in range(0, VP, BV):
        at = i * VP + first + rv
        rounded, change = tl.load(d_values + at), tl.trans(tl.load(changes + at))
        out = tile(d_output, out_t, rows, first, V, BV).to(DTYPE)
        d_scores = tl.dot(out, change, d_scores, input_precision=PRECISION)
        d_lower = tl.dot(rounded, change, d_lower, input_precision=PRECISION)
        d_value = rounded.to(tl.float32)
        is_there, at = (i < rows) & (first + rv < V), i * HV * V + first + rv
        if HAS_WRITE:
            logits = tile(write_beta, write_t, rows, first, V, BV)
            write = root(logits, LOGITS)
            of_write = root_gradient(logits, LOGITS) * write * tile(v, v_t, rows, first, V, BV) * d_value
            tl.store(d_write + at, of_write.to(d_write.dtype.element_ty), mask=is_there)
        elif SCALAR_BETA:
            write = erase[:, None]
            of_beta += tl.sum(write * tile(v, v_t, rows, first, V, BV) * d_value, 1)
        else:
            write = root(tile(beta, beta_t, rows, first, V, BV), LOGITS)
        tl.store(d_v + at, (write * d_value).to(d_v.dtype.element_ty), mask=is_there)
    of_scores, of_lower = tl.where(i >= j, d_scores, 0), tl.where(i > j, -d_lower, 0)
    apart = distance()
    if SCALAR_GATE:
        raw, g = gate_column(gate, gate_t, rows, rate, dt_bias + head, lower_bound, GATE, HAS_BIAS)
        of_pairs = tl.exp2(sums_between(g))
        of_lower, of_scores = (of_lower * of_pairs).to(DTYPE), (of_scores * of_pairs).to(DTYPE)
        of_sums, of_last = tl.zeros((C,), tl.float32), 0.0
    else:
        is_near = apart < 32
        near_lower, near_scores = tl.where(is_near, of_lower, 0).to(DTYPE), tl.where(is_near, of_scores, 0).to(DTYPE)
        far_lower, far_scores = tl.where(is_near, 0, of_lower).to(DTYPE), tl.where(is_near, 0, of_scores).to(DTYPE)
        halves, middle = matrix(matrices, HALVES), matrix(matrices, MIDDLE)
        upto, beyond = matrix(matrices, UPTO), matrix(matrices, BEYOND)
        of_rate = 0.0
    along_q, along_k = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    # Loaded one block of channels ahead.
    raw_query, raw_key = raw_tile(q, q_t, rows, 0, K, BK, True), raw_tile(k, k_t, rows, 0, K, BK, True)
    if not SCALAR_BETA:
        raw_beta = raw_tile(beta, beta_t, rows, 0, K, BK, True)
    if VP == BV:
        by_value = i * VP + rv
        of_values, of_changes = tl.trans(tl.load(d_values + by_value)), tl.trans(tl.load(changes + by_value))
        of_out = tl.trans(tile(d_output, out_t, rows, 0, V, BV).to(DTYPE))
    for first in range(0, KP, BK):
        query, key = raw_query.to(tl.float32) * (q_norm * scale)[None, :], raw_key.to(tl.float32) * k_norm[None, :]
        raw_query = raw_tile(q, q_t, rows, first + BK, K, BK, True)
        raw_key = raw_tile(k, k_t, rows, first + BK, K, BK, True)
        if SCALAR_BETA:
            key *= erase[None, :]
        else:
            key *= root(raw_beta.to(tl.float32), LOGITS)
            raw_beta = raw_tile(beta, beta_t, rows, first + BK, K, BK, True)
        d_row, d_query = tl.zeros((BK, C), tl.float32), tl.zeros((BK, C), tl.float32)
        d_column, of_state = tl.zeros((BK, C), tl.float32), tl.zeros((BK,), tl.float32)
        for value in tl.static_range(0, VP, BV):
            of_states = (value + rv)[None, :] * KP + (first + rk)[:, None]
            state, d_after = tl.load(befores + of_states), tl.load(d_afters + of_states)
            of_state += tl.sum(state.to(tl.float32) * d_after.to(tl.float32), 1)
            if VP != BV:
                by_value = i * VP + value + rv
                of_values, of_changes = tl.trans(tl.load(d_values + by_value)), tl.trans(tl.load(changes + by_value))
                of_out = tl.trans(tile(d_output, out_t, rows, value, V, BV).to(DTYPE))
            d_row = tl.dot(state, of_values, d_row, input_precision=PRECISION)
            d_query = tl.dot(state, of_out, d_query, input_precision=PRECISION)
            d_column = tl.dot(d_after, of_changes, d_column, input_precision=PRECISION)
        if SCALAR_GATE:
            from_begin, to_end = tl.exp2(tl.cumsum(g, 0))[None, :], tl.exp2(sums_beyond(g))[None, :]
            d_row, d_query, d_column = -d_row * from_begin, d_query * from_begin, d_column * to_end
            of_last += tl.sum(tl.sum(d_column * key, 1) + tl.exp2(tl.sum(g, 0)) * of_state, 0)
            d_sums, d_key = key * (d_row - d_column) + query * d_query, d_row + d_column
            d_query, d_key, d_sums = _level(
                key, query, 1.0, 1.0, of_lower, of_scores, d_query, d_key, d_sums, PRECISION
            )
            of_sums += tl.sum(d_sums, 0)
        else:
            _, g = gate_tile(
                gate, gate_t, rows, rate, dt_bias + head * K, lower_bound, first, K, BK, GATE, HAS_BIAS, True
            )
            added = addends(g)
            from_begin = tl.exp2(exponents(upto, added, EXACT, True))
            d_row, d_query = -d_row * from_begin, d_query * from_begin
            d_column *= tl.exp2(exponents(beyond, added, EXACT, True))
            last = tl.sum(d_column * key, 1) + tl.exp2(tl.sum(g, 1)) * of_state
            d_sums, d_key = key * (d_row - d_column) + query * d_query, d_row + d_column
            across = tl.exp2(exponents(halves, added, EXACT, True))
            d_query, d_key, d_sums = _level(
                key, query, across, across, far_lower, far_scores, d_query, d_key, d_sums, PRECISION
            )
            if RANGE == "mild" or RANGE == "mild only":
                exponent = exponents(middle, added, EXACT, True)
                d_query, d_key, d_sums = _level(
                    key, query, tl.exp2(exponent), tl.exp2(-exponent), near_lower, near_scores, d_query, d_key, d_sums,
                    PRECISION,
                )  # fmt: skip
            else:
                for level in range(0, HALVES):
                    decay = tl.exp2(exponents(matrix(matrices, level), added, EXACT, True))
                    is_pair = (apart >> level) == 1
                    lower, scores = tl.where(is_pair, near_lower, 0), tl.where(is_pair, near_scores, 0)
                    d_query, d_key, d_sums = _level(
                        key, query, decay, decay, lower, scores, d_query, d_key, d_sums, PRECISION
                    )
                of_same = tl.sum(tl.where(apart == 0, near_scores.to(tl.float32), 0), 0)[None, :]
                d_key += of_same * query
                d_query += of_same * key
            d_g = _suffix_sums(d_sums, upto, EXACT, PRECISION) + last[:, None]
            raw, g = gate_tile(
                gate, gate_t, rows, rate, dt_bias + head * K, lower_bound, first, K, BK, GATE, HAS_BIAS, True
            )
            is_there = (first + rk < K)[:, None] & (j < rows)
            of_raw, of_gate = _of_gate(raw, g, tl.where(is_there, d_g, 0), rate, lower_bound, GATE)
            at = (start * HV + head) * K + j * HV * K + (first + rk)[:, None]
            tl.store(d_gate + at, of_raw.to(d_gate.dtype.element_ty), mask=is_there)
            if GATE != "log":
                of_rate += tl.sum(tl.sum(of_gate, 1), 0)
            if HAS_BIAS:
                tl.store(d_biases + here * K + first + rk, tl.sum(of_raw, 1), mask=first + rk < K)
        at, is_there = j * HV * K + (first + rk)[:, None], (first + rk < K)[:, None] & (j < rows)
        if SCALAR_BETA:
            of_beta += tl.sum(key * d_key, 0)
            strong = erase[None, :]
        else:
            logits = tile(beta, beta_t, rows, first, K, BK, True)  # loaded again, to save registers
            strong = root(logits, LOGITS)
            of_strength = key * d_key
            if not HAS_WRITE:
                d_value = tl.load(d_values + j * VP + (first + rk)[:, None]).to(tl.float32)
                of_strength += strong * tile(v, v_t, rows, first, V, BK, True) * d_value
            of_strength *= root_gradient(logits, LOGITS)
            tl.store(d_beta + (start * HV + head) * K + at, of_strength.to(d_beta.dtype.element_ty), mask=is_there)
        along_q += tl.sum(query * d_query, 0)
        along_k += tl.sum(key * d_key, 0)
        if NORMALIZE and BK == KP:
            unit = tile(q, q_t, rows, first, K, BK, True) * q_norm[None, :]
            d_query = q_norm[None, :] * (scale * d_query - unit * along_q[None, :])
            unit = tile(k, k_t, rows, first, K, BK, True) * k_norm[None, :]
            d_key = k_norm[None, :] * (strong * d_key - unit * along_k[None, :])
        else:
            d_query, d_key = scale * d_query, strong * d_key
        tl.store(d_q + at, d_query.to(DTYPE), mask=is_there)
        tl.store(d_k + at, d_key.to(DTYPE), mask=is_there)

    if SCALAR_BETA:
        of_beta *= root_gradient(strength, LOGITS)
        tl.store(d_beta + (start + r) * HV + head, of_beta.to(d_beta.dtype.element_ty), mask=r < rows)
    if SCALAR_GATE:
        d_g = tl.sum(of_sums, 0) - tl.cumsum(of_sums, 0) + of_sums + of_last
        of_raw, of_gate = _of_gate(raw, g, tl.where(r < rows, d_g, 0), rate, lower_bound, GATE)
        tl.store(d_gate + (start + r) * HV + head, of_raw.to(d_gate.dtype.element_ty), mask=r < rows)
        of_rate = tl.sum(of_gate, 0)
        if HAS_BIAS:
            tl.store(d_biases + here, tl.sum(of_raw, 0))
    if GATE != "log":
        tl.store(d_rates + here, of_rate)
    if NORMALIZE and BK != KP:
        tl.debug_barrier()
        for first in range(0, KP, BK):
            at, is_there = i * HV * K + first + rk, (i < rows) & (first + rk < K)
            unit = tile(q, q_t, rows, first, K, BK) * q_norm[:, None]
            found = tl.load(d_q + at, mask=is_there, other=0).to(tl.float32)
            tl.store(d_q + at, (q_norm[:, None] * (found - unit * along_q[:, None])).to(DTYPE), mask=is_there)
            unit = tile(k, k_t, rows, first, K, BK) * k_norm[:, None]
            found = tl.load(d_k + at, mask=is_there, other=0).to(tl.float32)
            tl.store(d_k + at, (k_norm[:, None] * (found - unit * along_k[:, None])).to(DTYPE), mask=is_there)
