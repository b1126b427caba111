"""Building blocks of the gated delta rule's Triton kernels: location of a chunk, q̂ and κ, gates and decays.

A chunk is C = 64 tokens, and a tile is C × BK channels of one value head, in float32. Names are those of
:mod:`effpass.lowering.ops.gated_delta_rule_chunks`; g and all exponents are to base 2 here.

With one gate per head, exponents are differences of running sums of g, in which no token counts more than 2^-160, as
small as 0 in float32. Multiples of 1/128 and the rest are added up apart, since a sum of large numbers has too few
digits for the tokens after them. With a gate per channel, every exponent is a sum of g over some tokens, computed as
the product of a matrix of zeros and ones (:func:`table`) with g, because scans take three times the registers, and
differences of long sums lose digits. For this product g is rounded to float16, identically in all exponents, so that
results are exact for gates that differ from the given ones in the twelfth bit. For float32 inputs g is split into two
such pieces.

A pair of tokens in different halves of a chunk decays to and from the middle of the chunk, both with exponents ≤ 0. A
pair within one half decays to and from the middle of that half; one of the two factors then has an exponent above 0,
which is safe as long as no aligned group of 16 tokens decays below e^−80. A chunk in which one does is *steep*, the
others are *mild*. In a steep chunk, a pair within a half uses the middle of the block of 32, 16, 8, 4 or 2 tokens whose
halves separate it, as a pair in different halves of the chunk uses the middle of all 64.

In a mild chunk, `inside` lets pairs in different halves decay to and from the middle of the earlier half too, so that
each earlier token has one factor. That of the later token may be lost, which is below e^−87; no product of a pair is
lost then that decays by less than e^−7.

The constant RANGE tells which chunks a launch handles: all, none of which is steep ("mild") or any of which may be
("steep"), or only one of both kinds ("mild only", "steep only"). Two launches are used because a program that handles
both kinds has registers for neither, and because Triton 3.6 gives wrong results on sm_90 if both arms of an `if`
contain matrix products.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from effpass.lowering.ops.gated_delta_rule_inputs import EPSILON, SMALLEST_BETA

__all__ = ["LOWEST", "C", "lower_triangle", "table"]

C = tl.constexpr(64)
BLOCK = tl.constexpr(16)
LOG2_E = tl.constexpr(1 / math.log(2))
LOWEST = tl.constexpr(-80.0)  # e^80, and its products with factors down to e^-80, fit into float32 and bfloat16
_LOWEST_BASE_2 = tl.constexpr(-80.0 / math.log(2))
LEAST = tl.constexpr(-1000.0)  # 2^-1000 rounds to 0, and 64 times this number is in the range of float16
LEAST_OF_SUM = tl.constexpr(-160.0)
SIXTY_FOUR = tl.constexpr(64.0)  # factor that keeps weak gates from becoming denormal in float16
_EPSILON = tl.constexpr(EPSILON)
_SMALLEST_BETA = tl.constexpr(SMALLEST_BETA)

# Indices of the matrices in the table. Matrices 0 to 5 are for pairs across the middle of 2, 4, ... 64 tokens.
HALVES = tl.constexpr(5)
UPTO = tl.constexpr(6)
BEYOND = tl.constexpr(7)
MIDDLE = tl.constexpr(8)
JOINED = tl.constexpr(9)


@functools.cache
def table(device: torch.device) -> Tensor:
    """Return the matrices that sum g over the tokens of an exponent, float16 [10, C, C] with entries 0 and ±1/64.

    Row i of a matrix selects the tokens of the exponent of token i:

        level = 0 ... 5   between i and the middle of its block of 2 · 2^level tokens
        6                 up to and including i
        7                 after i
        8                 between i and the middle of its half of the chunk, negated if i precedes the middle
        9                 the same in the earlier half; in the later half, from the middle of the earlier half up to i
    """
    i, j = torch.arange(C.value)[:, None], torch.arange(C.value)[None, :]
    upto = j <= i
    levels = [((i >> level) == (j >> level)) & ((i >> level) % 2 == upto.long()) for level in range(6)]
    found = torch.stack([x.half() for x in (*levels, upto, ~upto)])
    is_early = ((i >> 4) % 2 == 0).half()
    middle = levels[4].half() * (1 - 2 * is_early)
    joined = torch.where(i < C.value // 2, middle, ((j >= BLOCK.value) & upto).half())
    return (torch.cat((found, middle[None], joined[None])) / 64).to(device)


@functools.cache
def lower_triangle(device: torch.device) -> Tensor:
    """Return bfloat16 [C, C], 1 up to the diagonal and 0 beyond it."""
    return torch.ones(C.value, C.value, dtype=torch.bfloat16).tril().to(device)


@triton.jit
def place(places, chunk, T, VARLEN: tl.constexpr):
    """First token of a chunk among all, int64, and how many tokens it has."""
    if VARLEN:
        start = tl.load(places + 2 * chunk).to(tl.int64)
        rows = tl.load(places + 2 * chunk + 1)
    else:
        each = tl.cdiv(T, C)
        sequence, number = chunk // each, chunk % each
        start = sequence.to(tl.int64) * T + number * C
        rows = tl.minimum(T - number * C, C)
    return start, rows


@triton.jit
def raw_tile(pointer, stride, rows, first, WIDTH: tl.constexpr, BK: tl.constexpr, FLIP: tl.constexpr = False):
    """[C, BK] of channels first ... of `rows` tokens, with FLIP [BK, C]; zeros beyond."""
    r, c = tl.arange(0, C), first + tl.arange(0, BK)
    if FLIP:
        at, is_there = c[:, None] + r[None, :] * stride, (c < WIDTH)[:, None] & (r < rows)[None, :]
    else:
        at, is_there = r[:, None] * stride + c[None, :], (r < rows)[:, None] & (c < WIDTH)[None, :]
    return tl.load(pointer + at, mask=is_there, other=0)


@triton.jit
def tile(pointer, stride, rows, first, WIDTH: tl.constexpr, BK: tl.constexpr):
    """:func:`raw_tile` in float32, without FLIP."""
    return raw_tile(pointer, stride, rows, first, WIDTH, BK).to(tl.float32)


@triton.jit
def column(pointer, stride, rows):
    """Float32 [C] of one number a token; zeros beyond."""
    r = tl.arange(0, C)
    return tl.load(pointer + r * stride, mask=r < rows, other=0).to(tl.float32)


@triton.jit
def inverse_norm(pointer, stride, rows, K: tl.constexpr, BK: tl.constexpr):
    """1 / ‖x‖ of each token; the loads are all in flight at once."""
    squares = tl.zeros((C, BK), tl.float32)
    for first in tl.static_range(0, K, BK):
        x = tile(pointer, stride, rows, first, K, BK)
        squares += x * x
    return tl.rsqrt(tl.sum(squares, 1) + _EPSILON)


@triton.jit
def root(beta, LOGITS: tl.constexpr):
    """√β."""
    return tl.rsqrt(1 + tl.exp2(-LOG2_E * beta)) if LOGITS else tl.sqrt(tl.maximum(beta, _SMALLEST_BETA))


@triton.jit
def root_gradient(x, beta, strength, LOGITS: tl.constexpr):
    """The gradient of β, or of its logit, from x = √β · d√β; strength is √β."""
    # x is scaled in place of a factor of β alone, which the compiler would compute in another layout and convert.
    x *= 0.5
    return x - x * strength * strength if LOGITS else x / tl.maximum(beta, _SMALLEST_BETA)


@triton.jit
def log_decay(raw, rate, lower_bound, GATE: tl.constexpr):
    """g, of base 2, of a gate that has its bias already."""
    if GATE == "softplus":
        return -LOG2_E * rate * (tl.maximum(raw, 0) + tl.log(1 + tl.exp(-tl.abs(raw))))
    elif GATE == "bounded":
        return LOG2_E * lower_bound / (1 + tl.exp2(-LOG2_E * rate * raw))
    else:
        return LOG2_E * raw


@triton.jit
def _gate_tile(gate, stride, rows, rate, dt_bias, lower_bound, first, K: tl.constexpr, BK: tl.constexpr,
               GATE: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """g, which is 0 beyond the last token and channel; shapes as :func:`tile`."""
    r, c = tl.arange(0, C), first + tl.arange(0, BK)
    raw = tile(gate, stride, rows, first, K, BK)
    if HAS_BIAS:
        raw += tl.load(dt_bias + c, mask=c < K, other=0).to(tl.float32)[None, :]
    is_there = (r < rows)[:, None] & (c < K)[None, :]
    return tl.where(is_there, log_decay(raw, rate, lower_bound, GATE), 0)


@triton.jit
def gate_column(gate, stride, rows, rate, dt_bias, lower_bound, GATE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Likewise of one gate a head, [C]."""
    raw = column(gate, stride, rows)
    if HAS_BIAS:
        raw += tl.load(dt_bias).to(tl.float32)
    g = tl.maximum(log_decay(raw, rate, lower_bound, GATE), LEAST_OF_SUM)
    return raw, tl.where(tl.arange(0, C) < rows, g, 0)


@triton.jit
def _parts(g):
    """g [C] as a multiple of 1/128, of which 64 add up without rounding, and the rest."""
    coarse = tl.floor(g * 128) / 128
    return coarse, g - coarse


@triton.jit
def sums_beyond(g):
    """Sums of g [C] over the tokens after each."""
    coarse, fine = _parts(g)
    return (tl.sum(coarse, 0) - tl.cumsum(coarse, 0)) + (tl.sum(fine, 0) - tl.cumsum(fine, 0))


@triton.jit
def sums_between(g):
    """Sums of g [C] over the tokens after j up to i, where j ≤ i, otherwise 0; [C, C]."""
    coarse, fine = _parts(g)
    coarse, fine = tl.cumsum(coarse, 0), tl.cumsum(fine, 0)
    found = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    return tl.where(tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :], found, 0)


@triton.jit
def distance():
    """i xor j; [C, C]. Its highest bit tells the level at which two tokens lie in different halves."""
    return tl.arange(0, C)[:, None] ^ tl.arange(0, C)[None, :]


@triton.jit
def matrix(matrices, WHICH):
    """One of the table's [C, C]."""
    return tl.load(matrices + WHICH * C * C + tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :])


@triton.jit
def gate_addends(raw, bias, rate, is_token, lower_bound, GATE: tl.constexpr):
    """64 g as :func:`exponents` takes it, from a gate and its bias; :func:`log_decay` in fewer instructions.

    is_token is 1 for tokens that exist and 0 for others, [C, 1] or, for tiles [BK, C], [1, C].
    """
    if GATE == "softplus":
        raw += bias
        factor = is_token * (-SIXTY_FOUR * LOG2_E * rate)
        return factor * (tl.maximum(raw, 0) + tl.log(1 + tl.exp(-tl.abs(raw))))
    elif GATE == "bounded":  # σ(x) is the square of 1 / √(1 + e^−x)
        slope = -LOG2_E * rate
        share = tl.rsqrt(1 + tl.exp2(slope * raw + slope * bias))
        factor = is_token * (SIXTY_FOUR * LOG2_E * lower_bound)
        return factor * (share * share)
    else:
        return (is_token * (SIXTY_FOUR * LOG2_E)) * raw


@triton.jit
def exponents(which, added, EXACT: tl.constexpr, FLIP: tl.constexpr = False):
    """Sums of g over the tokens that a matrix of the table names; shapes as :func:`tile`. EXACT: in two pieces."""
    high = added.to(tl.float16)
    found = tl.dot(high, tl.trans(which)) if FLIP else tl.dot(which, high)
    if EXACT:
        low = (added - high.to(tl.float32)).to(tl.float16)
        found = tl.dot(low, tl.trans(which), found) if FLIP else tl.dot(which, low, found)
    return found


@triton.jit
def steepness(gate, stride, rows, rate, dt_bias, lower_bound, K: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr,
              HAS_BIAS: tl.constexpr):  # fmt: skip
    """1 where some 16 tokens decay by more than e^-80 in some channel, else 0."""
    least = 0.0
    for first in range(0, K, BK):
        g = _gate_tile(gate, stride, rows, rate, dt_bias, lower_bound, first, K, BK, GATE, HAS_BIAS)
        least = tl.minimum(least, tl.min(tl.sum(tl.reshape(g, (C // BLOCK, BLOCK, BK)), 1)))
    return (least < _LOWEST_BASE_2).to(tl.int8)
