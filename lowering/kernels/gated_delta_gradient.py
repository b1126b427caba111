"""Triton kernels for the gradients of the gated delta rule's inputs, from those of ζ and of the states; for all chunks.

`value_gradient` computes what needs the values' channels: the gradients of v and the write strength, those of L and P,
and the products with the state S₀ before the chunk and with the gradient dS of the state after it. `key_gradient`
recomputes q̂, κ, g and the decays, in blocks of key channels, for the gradients of q, k, gate and β. One program of each
handles one chunk of a value head. Names are those of :mod:`effpass.lowering.ops.gated_delta_rule_chunks`. Operands of
products are rounded to the dtype of q; products and sums accumulate in float32. Of the gradients of A_log and dt_bias,
each warp writes the part of its tokens, and the launcher adds them up.

The gradients of norms, and that of one β per head, need sums over all key channels, which need no key channel: o is
linear in q̂, so that q̂·dq̂ = o·dO; and from (I + L) U = ζ − B̃ S₀ and dζ = dU − Lᵀ dζ follows κ·dκ = 2 U·dζ − ζ·dζ.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effpass.lowering.kernels.gated_delta_inputs import (
    BEYOND,
    HALVES,
    LEAST,
    LOG2_E,
    SIXTY_FOUR,
    UPTO,
    C,
    column,
    distance,
    exponents,
    gate_addends,
    gate_column,
    matrix,
    place,
    raw_tile,
    root,
    root_gradient,
    sums_between,
    sums_beyond,
)

__all__ = ["WARPS", "key_gradient", "value_gradient"]

# Key channels per tile of `key_gradient`, and warps of its programs; `_packed` and `_by_warp` are made for these.
TILE = tl.constexpr(16)
WARPS = tl.constexpr(4)


@triton.jit
def _of_gate(raw, d_g, rate, lower_bound, GATE: tl.constexpr):
    """Gradient of the raw gate, and of A_log before the sum over tokens and channels. `raw` has its bias already."""
    if GATE == "softplus":
        share = tl.rsqrt(1 + tl.exp2(-LOG2_E * raw))
        d_g *= -rate
        return d_g * (share * share), d_g * (tl.maximum(raw, 0) + tl.log(1 + tl.exp(-tl.abs(raw))))
    elif GATE == "bounded":
        share = tl.rsqrt(1 + tl.exp2(-LOG2_E * rate * raw))
        share *= share
        of_raw = (rate * lower_bound) * (share - share * share) * d_g
        return of_raw, raw * of_raw
    else:
        return d_g, d_g


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """x in DTYPE, and the same in float32.

    Of two bfloat16 equally near they may be different ones, and of NaN the second may be 0: with a conversion back, the
    compiler would convert each element by itself, which is slow.
    """
    if tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True) + 0x8000 & 0xFFFF0000
        return x.to(DTYPE), bits.to(tl.float32, bitcast=True)
    else:
        return x.to(DTYPE), x.to(DTYPE).to(tl.float32)


@triton.jit
def _packed(x):
    """[C, channels] in the order of the tiles [TILE, C] of :func:`key_gradient`, each as its threads hold it.

    Of a product of four warps, a thread holds tokens t and t + 1, channels d and d + 8, and the same 32 tokens later.
    Tiles that are read in this order need no change of layout.
    """
    x = tl.reshape(x, (2, 4, 4, 2, x.shape[1] // TILE, 2, 8))
    return tl.reshape(tl.permute(x, (4, 1, 6, 2, 0, 5, 3)), (C * x.shape[4] * TILE,))


@triton.jit
def _unpacked(x):
    """A tile [TILE, C]."""
    return tl.reshape(tl.permute(tl.reshape(x, (4, 8, 4, 2, 2, 2)), (4, 1, 3, 0, 2, 5)), (TILE, C))


@triton.jit
def _by_warp(x):
    """Sums over the tokens of each warp, [TILE, WARPS], so that no warp waits for another; x [TILE, C]."""
    return tl.sum(tl.sum(tl.reshape(x, (TILE, 2, WARPS, 8)), 3), 1)


@triton.jit
def _level(key, query, late, early, lower, scores, d_query, d_key, d_sums, PRECISION: tl.constexpr):
    """The gradients with what pairs of tokens give that decay by `late` to the later and from the earlier by `early`.

    What a pair adds to the sum of g at the later token it takes from that at the earlier. Both are computed from the
    same rounded factors, so that they cancel in all tokens before.
    """
    DTYPE: tl.constexpr = lower.dtype
    keys, same_keys = _rounded(key * early, DTYPE)
    late_keys, same_late_keys = _rounded(key * late, DTYPE)
    queries, same_queries = _rounded(query * late, DTYPE)
    of_rows = tl.dot(keys, tl.trans(lower), input_precision=PRECISION)
    of_queries = tl.dot(keys, tl.trans(scores), input_precision=PRECISION)
    of_columns = tl.dot(late_keys, lower, input_precision=PRECISION)
    of_columns = tl.dot(queries, scores, of_columns, input_precision=PRECISION)
    d_sums += same_late_keys * of_rows + same_queries * of_queries
    d_sums -= same_keys * of_columns
    return d_query + of_queries * late, d_key + of_rows * late + of_columns * early, d_sums


@triton.jit
def _suffix_sums(x, later, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """Sums over the tokens from each on; x [TILE, C]. In two pieces, since terms cancel: 2^-17 of the size is lost."""
    if EXACT:
        return tl.dot(x, later.to(tl.float32), input_precision=PRECISION)
    else:
        high, same = _rounded(x, tl.bfloat16)
        return tl.dot((x - same).to(tl.bfloat16), later, tl.dot(high, later))


@triton.jit
def value_gradient(
    v, gate, beta, write_beta, A_log, dt_bias, places, changes, d_values, befores, d_afters, output, d_output, d_v,
    d_beta, d_write, d_lower, d_scores, along, d_rows, d_queries, d_columns, of_states, T, HV, v_t, v_h, gate_t, gate_h,
    beta_t, beta_h, write_t, write_h, output_t, output_h, out_t, out_h, lower_bound, V: tl.constexpr, BV: tl.constexpr,
    VP: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, SCALAR_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr, SCALAR_BETA: tl.constexpr, HAS_WRITE: tl.constexpr, NORMALIZE: tl.constexpr,
    LOGITS: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of v, of its write strength and of one β per head, and what :func:`key_gradient` reads.

    If β is a vector and also the write strength, `d_write` is the gradient of β so far, as :func:`_packed` orders it.
    :func:`key_gradient` reads that; dL and dP, lower triangles; with norms `along`, q̂·dq̂ and κ·dκ of each token; and
    for each key channel, in the same order, `d_rows` dζ S₀ᵀ, `d_queries` dO S₀ᵀ and `d_columns` U dSᵀ, and
    `of_states`, the sums of S₀ ⊙ dS.
    """
    chunk, head = tl.program_id(0) // HV, (tl.program_id(0) % HV).to(tl.int64)
    start, rows = place(places, chunk, T, VARLEN)
    if rows <= 0:
        return
    DTYPE: tl.constexpr = changes.dtype.element_ty
    here = tl.program_id(0).to(tl.int64)
    r, rv = tl.arange(0, C), tl.arange(0, BV)
    i, j = r[:, None], r[None, :]
    v += start * v_t + head * v_h
    gate += start * gate_t + head * gate_h
    beta += start * beta_t + head * beta_h
    write_beta += start * write_t + head * write_h
    output += start * output_t + head * output_h
    d_output += start * out_t + head * out_h
    changes += here * C * VP
    d_values += here * C * VP
    befores += here * KP * VP
    d_afters += here * KP * VP
    d_v += (start * HV + head) * V
    if HAS_WRITE:
        d_write += (start * HV + head) * V
    if SCALAR_BETA:
        strength = column(beta, beta_t, rows)
        write = root(strength, LOGITS)[:, None]
    of_lower, of_scores = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    of_queries, of_changes = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    of_values = tl.zeros((C,), tl.float32)
    for first in range(0, VP, BV):
        at = i * VP + first + rv
        rounded, change = tl.load(d_values + at), tl.load(changes + at)
        raw_out, raw_value = raw_tile(d_output, out_t, rows, first, V, BV), raw_tile(v, v_t, rows, first, V, BV)
        if NORMALIZE:
            given = raw_tile(output, output_t, rows, first, V, BV)
        if HAS_WRITE:
            raw_write = raw_tile(write_beta, write_t, rows, first, V, BV)
        elif not SCALAR_BETA:
            raw_write = raw_tile(beta, beta_t, rows, first, V, BV)
        out = raw_out.to(tl.float32)
        if NORMALIZE:
            of_queries += tl.sum(out * given.to(tl.float32), 1)
        d_value, columns = rounded.to(tl.float32), tl.trans(change)
        of_scores = tl.dot(out.to(DTYPE), columns, of_scores, input_precision=PRECISION)
        of_lower = tl.dot(rounded, columns, of_lower, input_precision=PRECISION)
        of_changes += tl.sum(d_value * change.to(tl.float32), 1)
        is_there, at = (i < rows) & (first + rv < V), i * HV * V + first + rv
        if not SCALAR_BETA:
            logits = raw_write.to(tl.float32)
            write = root(logits, LOGITS)
        of_value = write * raw_value.to(tl.float32) * d_value
        of_values += tl.sum(of_value, 1)
        if not SCALAR_BETA:
            of_value = root_gradient(of_value, logits, write, LOGITS)
            if HAS_WRITE:
                tl.store(d_write + at, of_value.to(d_write.dtype.element_ty), mask=is_there)
            else:
                of_tiles = here * C * VP + first * C + tl.arange(0, C * BV)
                tl.store(d_write + of_tiles, _packed(of_value.to(d_write.dtype.element_ty)))
        tl.store(d_v + at, (write * d_value).to(d_v.dtype.element_ty), mask=is_there)
    of_scores, of_lower = tl.where(i >= j, of_scores, 0), tl.where(i > j, -of_lower, 0)
    if SCALAR_GATE:
        rate = tl.exp(tl.load(A_log + head).to(tl.float32)) if GATE != "log" else 1.0
        _, g = gate_column(gate, gate_t, rows, rate, dt_bias + head, lower_bound, GATE, HAS_BIAS)
        of_pairs = tl.exp2(sums_between(g))
        of_lower, of_scores = of_lower * of_pairs, of_scores * of_pairs
    square = here * C * C + i * C + j
    tl.store(d_lower + square, of_lower.to(DTYPE))
    tl.store(d_scores + square, of_scores.to(DTYPE))
    if NORMALIZE:
        tl.store(along + here * 2 * C + r, of_queries)
        tl.store(along + here * 2 * C + C + r, 2 * of_changes - of_values)
    if SCALAR_BETA:
        of_beta = root_gradient(2 * of_changes, strength, root(strength, LOGITS), LOGITS)
        tl.store(d_beta + (start + r) * HV + head, of_beta.to(d_beta.dtype.element_ty), mask=r < rows)
    rk = tl.arange(0, BK)
    for first in range(0, KP, BK):
        d_row, d_query = tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32)
        d_column, of_state = tl.zeros((C, BK), tl.float32), tl.zeros((BK,), tl.float32)
        for value in tl.range(0, VP, BV, num_stages=2):
            at = (value + rv)[:, None] * KP + first + rk
            state, d_after = tl.load(befores + at), tl.load(d_afters + at)
            at = i * VP + value + rv
            rounded, change = tl.load(d_values + at), tl.load(changes + at)
            out = raw_tile(d_output, out_t, rows, value, V, BV).to(DTYPE)
            d_row = tl.dot(rounded, state, d_row, input_precision=PRECISION)
            d_query = tl.dot(out, state, d_query, input_precision=PRECISION)
            d_column = tl.dot(change, d_after, d_column, input_precision=PRECISION)
            of_state += tl.sum(state.to(tl.float32) * d_after.to(tl.float32), 0)
        at = here * C * KP + first * C + tl.arange(0, C * BK)
        tl.store(d_rows + at, _packed(d_row.to(DTYPE)))
        tl.store(d_queries + at, _packed(d_query.to(DTYPE)))
        tl.store(d_columns + at, _packed(d_column.to(DTYPE)))
        tl.store(of_states + here * KP + first + rk, of_state)


@triton.jit
def key_gradient(
    q, k, gate, beta, A_log, dt_bias, places, matrices, triangle, steep, marks, norms, along, d_lower, d_scores, d_rows,
    d_queries, d_columns, of_states, of_values, d_q, d_k, d_gate, d_beta, d_rates, d_biases, sums_n, T, HV, q_t, q_h,
    k_t, k_h, gate_t, gate_h, beta_t, beta_h, scale, lower_bound, GROUP: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, GATE: tl.constexpr, SCALAR_GATE: tl.constexpr, HAS_BIAS: tl.constexpr, SCALAR_BETA: tl.constexpr,
    HAS_WRITE: tl.constexpr, NORMALIZE: tl.constexpr, LOGITS: tl.constexpr, VARLEN: tl.constexpr, RANGE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, gate and β, and of A_log and dt_bias by warps: `d_rates` and `d_biases`, rows `sums_n` apart.

    Tiles are transposed, [TILE, C], so that dL and dP, with which every block of channels is multiplied, lie in shared
    memory. In a mild chunk, exponents are differences of G, which is accurate to 2^-14, for factors in bfloat16.
    """
    chunk, head = tl.program_id(0) // HV, (tl.program_id(0) % HV).to(tl.int64)
    start, rows = place(places, chunk, T, VARLEN)
    if rows <= 0:
        return
    DTYPE: tl.constexpr = d_lower.dtype.element_ty
    EXACT: tl.constexpr = tl.float32 == DTYPE
    MILD: tl.constexpr = RANGE == "mild" or RANGE == "mild only"
    here = tl.program_id(0).to(tl.int64)
    if RANGE == "mild only":  # noqa: SIM102  (resolved when the kernel is compiled)
        if tl.load(steep + here) != 0:
            return
    if RANGE == "steep only":  # noqa: SIM102  (resolved when the kernel is compiled)
        if tl.load(steep + here) == 0:
            return
    r, rk, rw = tl.arange(0, C), tl.arange(0, TILE), tl.arange(0, WARPS)
    i, j = r[:, None], r[None, :]
    q += start * q_t + head // GROUP * q_h
    k += start * k_t + head // GROUP * k_h
    gate += start * gate_t + head * gate_h
    beta += start * beta_t + head * beta_h
    dt_bias += head if SCALAR_GATE else head * K
    marks += here * 4 * KP
    d_rows += here * C * KP
    d_queries += here * C * KP
    d_columns += here * C * KP
    of_states += here * KP
    of_values += here * C * KP
    d_rates += chunk.to(tl.int64) * WARPS * sums_n + head
    d_biases += chunk.to(tl.int64) * WARPS * sums_n + head * (1 if SCALAR_GATE else K)
    rate = tl.exp(tl.load(A_log + head).to(tl.float32)) if GATE != "log" else 1.0
    lower, scores = tl.load(d_lower + here * C * C + i * C + j), tl.load(d_scores + here * C * C + i * C + j)
    if SCALAR_GATE:
        raw, g = gate_column(gate, gate_t, rows, rate, dt_bias, lower_bound, GATE, HAS_BIAS)
        of_sums, of_last = tl.zeros((C,), tl.float32), 0.0
    else:
        is_token, apart, is_late = tl.where(j < rows, 1.0, 0.0), distance(), j >= C // 2
        rates = tl.zeros((TILE, C), tl.float32)
        upto, later = matrix(matrices, UPTO), matrix(triangle, 0)
        if not MILD:
            beyond = matrix(matrices, BEYOND)
    if SCALAR_BETA:
        strong = root(column(beta, beta_t, rows), LOGITS)[None, :]
    q_scale, k_scale = tl.zeros((1, C), tl.float32) + scale, tl.full((1, C), 1.0, tl.float32)
    if NORMALIZE:
        q_norm, k_scale = tl.load(norms + here * 2 * C + j), tl.load(norms + here * 2 * C + C + j)
        q_scale *= q_norm
        along_q = q_norm * q_norm * tl.load(along + here * 2 * C + j)
        along_k = k_scale * k_scale * tl.load(along + here * 2 * C + C + j)
    for first in range(0, KP, TILE):
        # Loads come first: the compiler moves none over the barriers of what follows.
        raw_query, raw_key = raw_tile(q, q_t, rows, first, K, TILE, True), raw_tile(k, k_t, rows, first, K, TILE, True)
        of_tile = first * C + tl.arange(0, C * TILE)
        d_row, d_query, d_column = tl.load(d_rows + of_tile), tl.load(d_queries + of_tile), tl.load(d_columns + of_tile)
        of_state, is_channel = tl.load(of_states + first + rk), first + rk < K
        if not SCALAR_BETA:
            raw_beta = raw_tile(beta, beta_t, rows, first, K, TILE, True)
            if not HAS_WRITE:
                so_far = tl.load(of_values + of_tile)
        if not SCALAR_GATE:
            raw_gate = raw_tile(gate, gate_t, rows, first, K, TILE, True)
            of_channel = marks + first + rk
            early_middle, late_middle = tl.load(of_channel), tl.load(of_channel + 2 * KP)
            total, bias = tl.load(of_channel + 3 * KP), 0.0
            if HAS_BIAS:
                bias = tl.load(dt_bias + first + rk, mask=is_channel, other=0).to(tl.float32)[:, None]
        d_row, d_query = _unpacked(d_row).to(tl.float32), _unpacked(d_query).to(tl.float32)
        d_column = _unpacked(d_column).to(tl.float32)
        at, is_there = (start * HV + head) * K + j * HV * K + (first + rk)[:, None], (j < rows) & is_channel[:, None]
        if not SCALAR_BETA:
            strong = root(raw_beta.to(tl.float32), LOGITS)
        query, key = raw_query.to(tl.float32) * q_scale, raw_key.to(tl.float32) * k_scale * strong
        if SCALAR_GATE:
            from_begin, to_end = tl.exp2(tl.cumsum(g, 0))[None, :], tl.exp2(sums_beyond(g))[None, :]
            d_row, d_query, d_column = -d_row * from_begin, d_query * from_begin, d_column * to_end
            of_last += tl.sum(tl.sum(d_column * key, 1) + tl.exp2(tl.sum(g, 0)) * of_state, 0)
            d_sums, d_key = key * (d_row - d_column) + query * d_query, d_row + d_column
            d_query, d_key, d_sums = _level(key, query, 1.0, 1.0, lower, scores, d_query, d_key, d_sums, PRECISION)
            of_sums += tl.sum(d_sums, 0)
        else:
            raw = raw_gate.to(tl.float32) + bias
            added = gate_addends(raw_gate.to(tl.float32), bias, rate, is_token, lower_bound, GATE)
            if K != KP:
                added = tl.where(is_channel[:, None], added, 0)
            if not MILD:
                added = tl.maximum(added, SIXTY_FOUR * LEAST)
            sums_upto = exponents(upto, added, EXACT, True)
            from_begin = tl.exp2(sums_upto)
            if MILD:
                d_column *= tl.exp2(total[:, None] - sums_upto)
            else:
                d_column *= tl.exp2(exponents(beyond, added, EXACT, True))
            d_row, d_query = -d_row * from_begin, d_query * from_begin
            last = tl.sum(d_column * key, 1) + tl.exp2(total) * of_state
            d_sums, d_key = key * (d_row - d_column) + query * d_query, d_row + d_column
            if MILD:
                exponent = sums_upto - late_middle[:, None]
                d_query, d_key, d_sums = _level(
                    key, query, tl.where(is_late, tl.exp2(exponent), 0), tl.where(is_late, tl.exp2(-exponent), 0),
                    lower, scores, d_query, d_key, d_sums, PRECISION,
                )  # fmt: skip
                exponent = sums_upto - early_middle[:, None]
                d_query, d_key, d_sums = _level(
                    key, query, tl.exp2(exponent), tl.where(is_late, 0, tl.exp2(-exponent)), lower, scores, d_query,
                    d_key, d_sums, PRECISION,
                )  # fmt: skip
            else:
                for level in range(0, HALVES + 1):
                    decay = tl.exp2(exponents(matrix(matrices, level), added, EXACT, True))
                    is_pair = (apart >> level) == 1
                    d_query, d_key, d_sums = _level(
                        key, query, decay, decay, tl.where(is_pair, lower, 0), tl.where(is_pair, scores, 0), d_query,
                        d_key, d_sums, PRECISION,
                    )  # fmt: skip
                of_same = tl.sum(tl.where(apart == 0, scores.to(tl.float32), 0), 0)[None, :]
                d_key += of_same * query
                d_query += of_same * key
            d_g = tl.where(is_there, _suffix_sums(d_sums, later, EXACT, PRECISION) + last[:, None], 0)
            of_raw, of_gate = _of_gate(raw, d_g, rate, lower_bound, GATE)
            tl.store(d_gate + at, of_raw.to(d_gate.dtype.element_ty), mask=is_there)
            if GATE != "log":
                rates += of_gate
            if HAS_BIAS:
                of_warp = rw[None, :] * sums_n + (first + rk)[:, None]
                tl.store(d_biases + of_warp, _by_warp(of_raw), mask=is_channel[:, None])
        if not SCALAR_BETA:
            of_strength = root_gradient(key * d_key, raw_beta.to(tl.float32), strong, LOGITS)
            if not HAS_WRITE:
                of_strength += _unpacked(so_far).to(tl.float32)
            tl.store(d_beta + at, of_strength.to(d_beta.dtype.element_ty), mask=is_there)
        d_query, d_key = q_scale * d_query, k_scale * (strong * d_key)
        if NORMALIZE:
            d_query -= raw_query.to(tl.float32) * along_q
            d_key -= raw_key.to(tl.float32) * along_k
        tl.store(d_q + at, d_query.to(DTYPE), mask=is_there)
        tl.store(d_k + at, d_key.to(DTYPE), mask=is_there)
    if SCALAR_GATE:
        d_g = tl.sum(of_sums, 0) - tl.cumsum(of_sums, 0) + of_sums + of_last
        of_raw, of_gate = _of_gate(raw, tl.where(r < rows, d_g, 0), rate, lower_bound, GATE)
        tl.store(d_gate + (start + r) * HV + head, of_raw.to(d_gate.dtype.element_ty), mask=r < rows)
        # Warps share these sums, which go to the first one's row.
        if HAS_BIAS:
            tl.store(d_biases + rw * sums_n, tl.where(rw == 0, tl.sum(of_raw, 0), 0))
        if GATE != "log":
            tl.store(d_rates + rw * sums_n, tl.where(rw == 0, tl.sum(of_gate, 0), 0))
    elif GATE != "log":
        tl.store(d_rates + rw * sums_n, tl.sum(_by_warp(rates), 0))
