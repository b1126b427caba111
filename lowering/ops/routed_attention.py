"""Trainable sparse attention: causal attention of each token over the blocks it chose, on packed sequences.

    out[t, h] = Σ_i p[t, h, i] v[i]        p[t, h] = softmax_i(scale · q[t, h] · k[i])

i runs over the tokens up to t in the blocks that t has chosen, together for all query heads of a KV head
(:mod:`effpass.lowering.ops.routed_blocks`). A budget of at least the sequence's length is dense causal attention. The
CPU computes masked scores of a few tokens at a time; a GPU uses the kernels of
:mod:`effpass.lowering.kernels.routed_attention`, whose work is proportional to the number of chosen pairs, independent
of their distribution.

Shapes: T tokens, N sequences, H query heads, G KV heads, K key size, V value size, P capacity of a list of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.core.errors import EffpassError
from effpass.core.flops import smaller
from effpass.lowering.ops.kernel_choice import triton_kernels
from effpass.lowering.ops.routed_blocks import Blocks, check_packed, check_rises

__all__ = ["GRADIENT_TOLERANCE", "TOLERANCE", "routed_attention", "trainable_sparse_attention"]

#: Maximum deviation of an output from the same sums in float64, as root mean square relative to theirs. Kernels round
#: weights, and each block's contribution to an output, to the inputs' dtype.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-10}

#: Maximum deviation of a gradient, measured alike; a gradient is a sum of products of such rounded numbers.
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float64: 1e-9}

_SCORES = 1 << 24  # scores that are computed at once


def trainable_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    budget: Tensor,
    *,
    block: int = 256,
    max_budget: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention over blocks that tokens choose, differentiable in q, k and v.

    Args:
        q: [T, H, K], sequences packed along T.
        k: [T, G, K], where G divides H.
        v: [T, G, V].
        cu_seqlens: int32 or int64 [N + 1], offsets of the sequences, ending with T.
        budget: int32 or int64 [], number of keys that a token attends to, rounded up to whole blocks; read on the
            device. It must not be modified between a forward pass and its backward pass, since activation checkpointing
            reads it again.
        block: keys per block.
        max_budget: largest value of `budget`, which determines the size of lists and buffers; None for no limit.
        scale: factor applied to the scores; K^(−1/2) by default.

    Returns:
        output: [T, H, V], of v's dtype, or that of autocast.
        coverage: float32 [], share of the router's softmax over visible blocks that the chosen blocks hold, averaged
            over tokens and KV heads; without gradient.

    Raises:
        EffpassError: in the cases of :func:`~effpass.lowering.ops.routed_blocks.route_blocks` and
            :func:`routed_attention`.
    """
    if torch.is_autocast_enabled(q.device.type):  # autocast treats other attention operators alike
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    chosen, coverage = torch.ops.effpass.route_blocks(
        q.detach(), k.detach(), cu_seqlens, budget, block, max_budget, factor
    )
    out, _ = torch.ops.effpass.routed_attention(q, k, v, cu_seqlens, chosen, block, factor)
    return out, coverage


# -- the operator -----------------------------------------------------------------------------------------------------

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor chosen"


@torch.library.custom_op(
    "effpass::routed_attention",
    mutates_args=(),
    schema=f"({_TENSORS}, int block, float scale) -> (Tensor, Tensor)",
)
def routed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, chosen: Tensor, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention over given blocks.

    Args:
        q: [T, H, K].
        k: [T, G, K].
        v: [T, G, V].
        cu_seqlens: int32 or int64 [N + 1], offsets of the sequences, ending with T.
        chosen: int32 [G, T, P], blocks from the first of the token's sequence up to its own, which must be included;
            ascending, followed by -1.
        block: keys per block.
        scale: factor applied to the scores.

    Returns:
        output: [T, H, V].
        logsumexp: [T, H], log-sum-exp of the scaled scores, float32 or float64; without gradient.

    Raises:
        EffpassError: if sizes or dtypes don't fit; on the CPU also if `cu_seqlens` does not rise from 0 to T.
    """
    _check(q, k, v, cu_seqlens, chosen, block)
    kernels = _kernels(q, k, v, chosen, scale)
    if kernels is not None:
        return kernels.forward(q, k, v, cu_seqlens, chosen, block, scale)
    out, logsumexp = v.new_empty((*q.shape[:2], v.shape[2])), q.new_empty(q.shape[:2], dtype=_wide(q))
    with torch.autocast(q.device.type, enabled=False):  # autocast inside an operator would round again
        for part in _parts(q, k, v, cu_seqlens, chosen, block, scale):
            logsumexp[part.rows] = part.scores.logsumexp(-1).permute(2, 0, 1).flatten(1)
            out[part.rows] = (part.scores.softmax(-1) @ part.value).permute(2, 0, 1, 3).flatten(1, 2).to(v.dtype)
    return out, logsumexp


@routed_attention.register_fake
def _(q, k, v, cu_seqlens, chosen, block, scale):  # type: ignore[no-untyped-def]
    _check(q, k, v, cu_seqlens, chosen, block)
    return v.new_empty((*q.shape[:2], v.shape[2])), q.new_empty(q.shape[:2], dtype=_wide(q))


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _kernels(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, scale: float) -> Any:
    kernels = triton_kernels("routed_attention") if q.is_cuda else None
    return kernels if kernels and kernels.supported(q, k, v, chosen, scale) else None


class _Part(NamedTuple):
    """The tokens of a slice `rows`, the keys up to the last of them, and their scores; -inf for unread keys.

    Shapes: t tokens, s keys, G KV heads, R query heads of each.
    """

    rows: slice
    keys: slice
    query: Tensor  # [G, R, t, K]
    key: Tensor  # [G, 1, s, K]
    value: Tensor  # [G, 1, s, V]
    scores: Tensor  # [G, R, t, s]


def _parts(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, chosen: Tensor, block: int, scale: float
) -> Iterator[_Part]:
    tokens, groups = q.shape[0], k.shape[1]
    check_rises(cu_seqlens, tokens)
    blocks = Blocks.of(cu_seqlens, tokens, block)
    step = max(1, _SCORES // (tokens * q.shape[1]))
    t = torch.arange(tokens, device=q.device)
    for begin in range(0, tokens, step):
        rows = slice(begin, min(begin + step, tokens))
        keys = slice(int(blocks.start[blocks.first[begin]]), rows.stop)
        listed = torch.where(chosen[:, rows] < 0, blocks.start.shape[0], chosen[:, rows]).long()
        is_chosen = q.new_zeros((*listed.shape[:2], blocks.start.shape[0] + 1), dtype=torch.bool)
        is_chosen.scatter_(2, listed, True)
        is_read = is_chosen[..., blocks.own[keys].long()] & (t[keys] <= t[rows, None])
        query = q[rows].to(_wide(q)).unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
        key, value = (x[keys].to(_wide(q)).transpose(0, 1)[:, None] for x in (k, v))
        scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~is_read[:, None], float("-inf"))
        yield _Part(rows, keys, query, key, value, scores)


@register_flop_formula(torch.ops.effpass.routed_attention)
def _(q: Any, k: Any, v: Any, cu_seqlens: Any, chosen: Any, block: int, *args: Any, **kwargs: Any) -> Any:
    return 2 * _pairs(q, chosen, block) * (q[2] + v[2])


def _pairs(q: Any, chosen: Any, block: int) -> Any:
    """Number of scores over all heads, for one sequence with full lists."""
    most = smaller(chosen[2] * block, q[0])
    return q[1] * (q[0] * most - most * most // 2)


# -- gradients --------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "effpass::routed_attention_backward",
    mutates_args=(),
    schema=f"(Tensor d_output, Tensor output, Tensor logsumexp, {_TENSORS}, int block, float scale) "
    "-> (Tensor, Tensor, Tensor)",
)
def routed_attention_backward(
    d_output: Tensor, output: Tensor, logsumexp: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor,
    chosen: Tensor, block: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of q, k and v; scores are recomputed.

    δ = Σ dout · out     dp = dout vᵀ     ds = scale · p (dp − δ)     dq = ds k     dk = dsᵀ q     dv = pᵀ dout
    """
    _check(q, k, v, cu_seqlens, chosen, block)
    kernels = _kernels(q, k, v, chosen, scale)
    if kernels is not None:
        return kernels.backward(d_output, output, logsumexp, q, k, v, cu_seqlens, chosen, block, scale)
    groups = k.shape[1]
    d_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    d_k, d_v = (torch.zeros(x.shape, dtype=_wide(q), device=q.device) for x in (k, v))

    def grouped(x: Tensor) -> Tensor:
        return x.to(_wide(q)).unflatten(1, (groups, -1)).permute(1, 2, 0, 3)

    with torch.autocast(q.device.type, enabled=False):
        for part in _parts(q, k, v, cu_seqlens, chosen, block, scale):
            of_out, out = grouped(d_output[part.rows]), grouped(output[part.rows])
            p = (part.scores - grouped(logsumexp[part.rows, :, None])).exp()
            d_scores = p * (of_out @ part.value.transpose(-1, -2) - (of_out * out).sum(-1, keepdim=True)) * scale
            d_q[part.rows] = (d_scores @ part.key).permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
            d_k[part.keys] += (d_scores.transpose(-1, -2) @ part.query).sum(1).transpose(0, 1)
            d_v[part.keys] += (p.transpose(-1, -2) @ of_out).sum(1).transpose(0, 1)
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype)


@routed_attention_backward.register_fake
def _(d_output, output, logsumexp, q, k, v, *args):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


@register_flop_formula(torch.ops.effpass.routed_attention_backward)
def _(d_output: Any, output: Any, logsumexp: Any, q: Any, k: Any, v: Any, cu_seqlens: Any, chosen: Any, block: int,
      *args: Any, **kwargs: Any) -> Any:  # fmt: skip
    return 2 * _pairs(q, chosen, block) * (3 * q[2] + 2 * v[2])  # recomputed scores, dp, dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, logsumexp = output
    ctx.mark_non_differentiable(logsumexp)
    ctx.save_for_backward(out, logsumexp, *inputs[:5])
    ctx.constants = inputs[5:]


def _backward(ctx: Any, d_output: Tensor, _: Any) -> Any:
    found = torch.ops.effpass.routed_attention_backward(d_output, *ctx.saved_tensors, *ctx.constants)
    needs = ctx.needs_input_grad
    return (*(x if needed else None for x, needed in zip(found, needs, strict=False)), None, None, None, None)


routed_attention.register_autograd(_backward, setup_context=_save)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, chosen: Tensor, block: int) -> None:
    check_packed("routed_attention", q, k, cu_seqlens, block)
    if v.dim() != 3 or v.shape[:2] != k.shape[:2] or v.dtype != q.dtype:
        raise EffpassError(
            f"effpass::routed_attention: v {tuple(v.shape)} in {v.dtype}, k {tuple(k.shape)} in {k.dtype}",
            hint="v is [T, G, V] beside k [T, G, K], of one type",
        )
    if chosen.dim() != 3 or chosen.shape[:2] != (k.shape[1], q.shape[0]) or chosen.dtype != torch.int32:
        raise EffpassError(
            f"effpass::routed_attention: chosen is {str(chosen.dtype).removeprefix('torch.')} {tuple(chosen.shape)} "
            f"for q {tuple(q.shape)} and k {tuple(k.shape)}",
            hint="chosen is int32 [G, T, P], as effpass::route_blocks returns it",
        )
