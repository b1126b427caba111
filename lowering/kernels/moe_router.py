"""Triton kernel of `effpass::moe_router`: the experts of each token and their weights from the logits of a router.

    c = logits, or σ(logits) + bias;  experts = the k largest c of the best groups
    weights = scale · s[experts] / (Σ s[experts] + eps)                     s = softmax(logits) or σ(logits)

One program of one warp handles a token, whose logits it holds in registers. Values are compared as int32 keys, which
have the order of the floats with NaN above all numbers; each of the k largest is found by two integer reductions, the
maximum of the keys and the least index that has it. The sigmoid that decides the choice is computed like PyTorch's: the
exponential of CUDA's library and an exact division, so that both choose the same experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, libdevice

from effpass.lowering.kernels.launch import interpreted, launch_options, overlaps

__all__ = ["moe_router"]

_NONE = tl.constexpr(-(1 << 31))  # key of an expert that can't be chosen (any more): less than that of -inf
_LIBRARY = tl.constexpr(not interpreted())  # the interpreter has no functions of CUDA's library


def moe_router(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring_func: str,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    eps: float,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Run `effpass::moe_router` on at most `MAX_EXPERTS` experts and `MAX_TOP_K` experts per token."""
    logits = logits.contiguous()
    bias = None if bias is None else bias.contiguous()
    (tokens, experts), device = logits.shape, logits.device
    if topk_group == n_group:
        n_group = topk_group = 1
    chosen = torch.empty(tokens, top_k, dtype=torch.int64, device=device)
    weights = torch.empty(tokens, top_k, dtype=dtype, device=device)
    if tokens:
        size = experts // n_group
        _route[(tokens,)](
            logits, bias, chosen, weights, eps, scale,
            EXPERTS=experts, TOP_K=top_k, N_GROUP=n_group, TOPK_GROUP=topk_group, SIGMOID=scoring_func == "sigmoid",
            NORM=norm_topk_prob, EXPERTS2=triton.next_power_of_2(experts), TOP_K2=triton.next_power_of_2(top_k),
            N_GROUP2=triton.next_power_of_2(n_group), SIZE2=triton.next_power_of_2(size), PDL=overlaps(device),
            **launch_options(device, 1),
        )  # fmt: skip
    return chosen, weights


@triton.jit
def _exp(x):
    if _LIBRARY:
        return libdevice.exp(x)
    else:
        return tl.exp(x)


@triton.jit
def _sigmoid(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + _exp(-x))


@triton.jit
def _key(x):
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # make -0.0 and 0.0 equal
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, key)


@triton.jit
def _float(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _compared(logits, bias, index, inside):
    """Keys of experts; `_NONE` outside."""
    value = tl.load(logits + index, mask=inside, other=0).to(tl.float32)
    if bias is not None:
        value = _sigmoid(value) + tl.load(bias + index, mask=inside, other=0).to(tl.float32)
    return tl.where(inside, _key(value), _NONE)


@triton.jit
def _in_best_groups(
    logits, bias, expert, SIZE: tl.constexpr, N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, N_GROUP2: tl.constexpr,
    SIZE2: tl.constexpr,
):  # fmt: skip
    """Whether each of the experts `expert` belongs to one of the best groups, as int32."""
    group, member = tl.arange(0, N_GROUP2), tl.arange(0, SIZE2)
    inside = (group < N_GROUP)[:, None] & (member < SIZE)[None, :]
    key = _compared(logits, bias, group[:, None] * SIZE + member[None, :], inside)
    best = tl.max(key, 1)
    if bias is not None:
        first = tl.min(tl.where(key == best[:, None], member[None, :], SIZE2), 1)
        second = tl.max(tl.where(member[None, :] == first[:, None], _NONE, key), 1)
        best = _key(_float(best) + _float(second))
    best = tl.where(group < N_GROUP, best, _NONE)
    found = tl.zeros_like(expert)
    for _ in range(TOPK_GROUP):
        number = tl.min(tl.where(best == tl.max(best, 0), group, N_GROUP2), 0)
        best = tl.where(group == number, _NONE, best)
        found = tl.where(expert // SIZE == number, 1, found)
    return found


@triton.jit(do_not_specialize=["eps", "scale"])
def _route(
    logits, bias, chosen, weights, eps, scale, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr, SIGMOID: tl.constexpr, NORM: tl.constexpr, EXPERTS2: tl.constexpr, TOP_K2: tl.constexpr,
    N_GROUP2: tl.constexpr, SIZE2: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    logits += token * EXPERTS
    expert, place = tl.arange(0, EXPERTS2), tl.arange(0, TOP_K2)
    inside, asked = expert < EXPERTS, place < TOP_K

    key = _compared(logits, bias, expert, inside)
    if N_GROUP > 1:
        found = _in_best_groups(logits, bias, expert, EXPERTS // N_GROUP, N_GROUP, TOPK_GROUP, N_GROUP2, SIZE2)
        key = tl.where(found == 1, key, _NONE)
    best = tl.zeros([TOP_K2], tl.int32)
    for number in range(TOP_K):
        winner = tl.min(tl.where(key == tl.max(key, 0), expert, EXPERTS2), 0)
        key = tl.where(expert == winner, _NONE, key)
        best = tl.where(place == number, winner, best)

    score = tl.load(logits + best, mask=asked, other=0).to(tl.float32)
    if SIGMOID:
        score = _sigmoid(score)
    else:
        every = tl.load(logits + expert, mask=inside, other=float("-inf")).to(tl.float32)
        highest = tl.max(every, 0)
        total = tl.sum(_exp(every - highest), 0)
        score = tl.div_rn(_exp(score - highest), tl.zeros_like(score) + total)
    score = tl.where(asked, score, 0.0)
    if NORM:
        score = tl.div_rn(score, tl.zeros_like(score) + (tl.sum(score, 0) + eps))
    at = token * TOP_K + place
    tl.store(chosen + at, best.to(tl.int64), mask=asked)
    tl.store(weights + at, (score * scale).to(weights.dtype.element_ty), mask=asked)
