"""Tiles that the kernels of the gated delta rule begin with: where a chunk lies, q̂ and κ, decays, products under them.

A chunk is C = 64 tokens, a tile C × BK channels of one value head. Names as in
:mod:`effpass.lowering.ops.gated_delta_rule_chunks`; g and all exponents are of base 2. Every exponent is a sum of some
tokens' g, and computed as a product of g with a matrix of zeros and ones (:func:`table`): scans take three times the
registers, and differences of long sums lose digits. g is rounded to float16 for it, the same in all of them, so that
what is computed is exact for gates that differ in the twelfth bit.

Pairs of tokens in different halves of a chunk decay to and from its middle, both by exponents ≤ 0. Pairs in one half
decay to and from the middle of that half: one factor has an exponent above 0, which is safe as long as no 16 tokens
decay by more than e^−80. In a chunk where some do, a steep one, the middles of 32, 16, 8, 4 and 2 tokens do what that
of 64 does. RANGE says which chunks a launch takes: all, of which none is steep ("mild") or any may be ("steep"), or one
kind and not the other ("mild only", "steep only"): a program that can do both has registers for neither, and with
products of matrices in the two arms of an `if` Triton 3.6 gives wrong results on sm_90.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from effpass.lowering.ops.gated_delta_rule_inputs import EPSILON, SMALLEST_BETA

__all__ = ["LOWEST", "C", "table"]

C = tl.constexpr(64)
BLOCK = tl.constexpr(16)
LOG2_E = tl.constexpr(1 / math.log(2))
LOWEST = tl.constexpr(-80.0)  # e^80 and its products with anything that is e^-80 stay in float32's and bfloat16's range
_LOWEST_BASE_2 = tl.constexpr(-80.0 / math.log(2))
_LEAST = tl.constexpr(-1000.0)  # 2^-1000 is 0, and 64 times this is in float16's range
_SIXTY_FOUR = tl.constexpr(64.0)  # so that weak gates are no denormal numbers
_EPSILON = tl.constexpr(EPSILON)
_SMALLEST_BETA = tl.constexpr(SMALLEST_BETA)

# The matrices of the table: pairs across the middle of 2, 4, ... 64 tokens are 0 to 5.
HALVES = tl.constexpr(5)
UPTO = tl.constexpr(6)
BEYOND = tl.constexpr(7)
MIDDLE = tl.constexpr(8)


@functools.cache
def table(device: torch.device) -> Tensor:
    """float16 [9, C, C]: which tokens' g an exponent of token i has, as ±1/64.

    0 to 5: from the middle of 2 · 2^level tokens to i, or from i to it; 6: up to i; 7: beyond i; 8: from the middle of
    i's half of the chunk to i, negative where i comes first.
    """
    i, j = torch.arange(C.value)[:, None], torch.arange(C.value)[None, :]
    upto = j <= i
    levels = [((i >> level) == (j >> level)) & ((i >> level) % 2 == upto.long()) for level in range(6)]
    found = torch.stack([x.half() for x in (*levels, upto, ~upto)])
    is_early = ((i >> 4) % 2 == 0).half()
    middle = levels[4].half() * (1 - 2 * is_early)
    return (torch.cat((found, middle[None])) / 64).to(device)


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
def tile(pointer, stride, rows, first, WIDTH: tl.constexpr, BK: tl.constexpr, FLIP: tl.constexpr = False):
    """Float32 [C, BK] of channels first ... of `rows` tokens, with FLIP [BK, C]; zeros beyond."""
    r, c = tl.arange(0, C), first + tl.arange(0, BK)
    if FLIP:
        at, is_there = c[:, None] + r[None, :] * stride, (c < WIDTH)[:, None] & (r < rows)[None, :]
    else:
        at, is_there = r[:, None] * stride + c[None, :], (r < rows)[:, None] & (c < WIDTH)[None, :]
    return tl.load(pointer + at, mask=is_there, other=0).to(tl.float32)


@triton.jit
def column(pointer, stride, rows):
    """Float32 [C] of one number a token; zeros beyond."""
    r = tl.arange(0, C)
    return tl.load(pointer + r * stride, mask=r < rows, other=0).to(tl.float32)


@triton.jit
def inverse_norm(pointer, stride, rows, K: tl.constexpr, BK: tl.constexpr):
    total = tl.zeros((C,), tl.float32)
    for first in range(0, K, BK):
        x = tile(pointer, stride, rows, first, K, BK)
        total += tl.sum(x * x, 1)
    return tl.rsqrt(total + _EPSILON)


@triton.jit
def root(beta, LOGITS: tl.constexpr):
    """√β."""
    return tl.rsqrt(1 + tl.exp(-beta)) if LOGITS else tl.sqrt(tl.maximum(beta, _SMALLEST_BETA))


@triton.jit
def root_gradient(beta, LOGITS: tl.constexpr):
    """What turns κ · dκ into the gradient of β or its logit."""
    return 0.5 / (1 + tl.exp(beta)) if LOGITS else 0.5 / tl.maximum(beta, _SMALLEST_BETA)


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
def gate_tile(gate, stride, rows, rate, dt_bias, lower_bound, first, K: tl.constexpr, BK: tl.constexpr,
              GATE: tl.constexpr, HAS_BIAS: tl.constexpr, FLIP: tl.constexpr = False):  # fmt: skip
    """Gate with its bias, and g, which is 0 beyond the last token and channel; shapes as :func:`tile`."""
    r, c = tl.arange(0, C), first + tl.arange(0, BK)
    raw = tile(gate, stride, rows, first, K, BK, FLIP)
    if HAS_BIAS:
        bias = tl.load(dt_bias + c, mask=c < K, other=0).to(tl.float32)
        raw += bias[:, None] if FLIP else bias[None, :]
    is_there = (c < K)[:, None] & (r < rows)[None, :] if FLIP else (r < rows)[:, None] & (c < K)[None, :]
    return raw, tl.where(is_there, log_decay(raw, rate, lower_bound, GATE), 0)


@triton.jit
def gate_column(gate, stride, rows, rate, dt_bias, lower_bound, GATE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Likewise of one gate a head, [C]."""
    raw = column(gate, stride, rows)
    if HAS_BIAS:
        raw += tl.load(dt_bias).to(tl.float32)
    return raw, tl.where(tl.arange(0, C) < rows, log_decay(raw, rate, lower_bound, GATE), 0)


@triton.jit
def distance():
    """i xor j; [C, C]. Its highest bit tells the level at which two tokens lie in different halves."""
    return tl.arange(0, C)[:, None] ^ tl.arange(0, C)[None, :]


@triton.jit
def matrix(matrices, WHICH):
    """One of the table's [C, C]."""
    return tl.load(matrices + WHICH * C * C + tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :])


@triton.jit
def addends(g):
    """g as :func:`exponents` takes it, in float32."""
    return _SIXTY_FOUR * tl.maximum(g, _LEAST)


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
        _, g = gate_tile(gate, stride, rows, rate, dt_bias, lower_bound, first, K, BK, GATE, HAS_BIAS)
        least = tl.minimum(least, tl.min(tl.sum(tl.reshape(g, (C // BLOCK, BLOCK, BK)), 1)))
    return (least < _LOWEST_BASE_2).to(tl.int8)
