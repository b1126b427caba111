"""Routing of a mixture-of-experts layer: the experts of each token and their weights, in one kernel launch.

    s = softmax(logits) or σ(logits);  c = s + bias
    experts = the k experts with the largest c, of the topk_group groups with the largest scores
    weights = scale · s[experts] / (Σ s[experts] + eps)              without the division if norm_topk_prob is False

Experts form n_group groups of equal size. The score of a group is its largest c or, with a bias, the sum of its two
largest. The bias decides the choice only. With these parameters the operator is the router of:

| family | scores | groups | weights |
|---|---|---|---|
| Mixtral (https://arxiv.org/abs/2401.04088), Qwen3-MoE, OLMoE | softmax | 1 | normalized or not |
| GPT-OSS: softmax of the k largest logits, which is the same | softmax | 1 | normalized |
| DeepSeek-V2 (https://arxiv.org/abs/2405.04434) | softmax | n | scaled |
| DeepSeek-V3 (https://arxiv.org/abs/2412.19437), GLM-4-MoE | sigmoid, bias | n | normalized, scaled |

All computation is in float32, and weights are rounded once. The operator is for inference; it has no gradient.

Shapes: N tokens, E experts, k experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.core.errors import EffpassError, did_you_mean
from effpass.lowering.ops.kernel_choice import triton_kernels

__all__ = ["MAX_EXPERTS", "MAX_TOP_K", "SCORING_FUNCS", "TOLERANCE", "has_kernel", "moe_router"]

#: Maximum deviation of the kernel's weights from the reference, relative to the largest weight: sums in another order
#: and another exponential change the last bits of the float32 value, and with them the direction of rounding to a
#: shorter dtype. The experts are the same.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

#: What the kernel holds in the registers of one warp: the experts of a layer, and those of a token.
MAX_EXPERTS, MAX_TOP_K = 1024, 32

SCORING_FUNCS = ("softmax", "sigmoid")


def has_kernel(device: torch.device, dtype: torch.dtype, rows: int) -> bool:
    """Whether a GPU kernel supports a dtype of the logits, for any number of tokens."""
    known = dtype in (torch.float32, torch.float16, torch.bfloat16)
    return device.type == "cuda" and known and triton_kernels("moe_router") is not None


def _moe_router(
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
    wide = logits.to(torch.float32)
    scores = wide.softmax(-1) if scoring_func == "softmax" else wide.sigmoid()
    # Both functions rise with the logit. Comparing logits tells experts apart whose scores round to the same value.
    compared = wide if bias is None else scores + bias
    experts = _experts(compared, top_k, n_group, topk_group, 1 if bias is None else 2).contiguous()
    weights = scores.gather(1, experts)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return experts, (weights * scale).to(dtype)


def _experts(compared: Tensor, top_k: int, n_group: int, topk_group: int, summed: int) -> Tensor:
    """The experts [N, k] with the largest values; a group's score is the sum of its `summed` largest."""
    if topk_group == n_group:
        return _largest(compared, top_k)
    size = compared.shape[1] // n_group
    by_group = compared.unflatten(1, (n_group, size))
    groups = _largest(by_group.sort(-1, descending=True).values[..., :summed].sum(-1), topk_group)
    members = groups.sort(-1).values.unsqueeze(-1) * size + torch.arange(size, device=compared.device)
    members = members.flatten(1)
    return members.gather(1, _largest(compared.gather(1, members), top_k))


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices of the largest values in each row, of equal ones the lowest index first; `topk` leaves this open."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]


@torch.library.custom_op(
    "effpass::moe_router",
    mutates_args=(),
    schema="(Tensor logits, Tensor? bias, int top_k, str scoring_func, int n_group, int topk_group, "
    "bool norm_topk_prob, float eps, float scale, ScalarType dtype) -> (Tensor, Tensor)",
)
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
    """Choose the experts of each token.

    Experts are in the order of c, the largest first; of equal ones the lowest index is first. Without a bias, experts
    are compared by their logits. NaN is larger than all numbers, as in `torch.sort`.

    Args:
        logits: floating-point [N, E].
        bias: correction bias [E], added to the scores for the choice alone (transformers: `e_score_correction_bias`);
            None for no bias. Needs sigmoid scores.
        top_k: k.
        scoring_func: ``"softmax"`` or ``"sigmoid"``.
        n_group: number of groups, which divides E. With a bias, a group that competes has at least two experts.
        topk_group: number of groups whose experts can be chosen; they must have at least k experts.
        norm_topk_prob: whether the weights of a token are divided by their sum.
        eps: number added to that sum.
        scale: factor of the weights (transformers: `routed_scaling_factor`).
        dtype: dtype of the weights.

    Returns:
        experts: int64 [N, k], different ids in 0 … E - 1 for every token, whatever its logits.
        weights: [N, k], of `dtype`.

    Raises:
        EffpassError: if the shapes, or the numbers of experts and groups, don't fit together.
    """
    _check(logits, bias, top_k, scoring_func, n_group, topk_group)
    return _moe_router(logits, bias, top_k, scoring_func, n_group, topk_group, norm_topk_prob, eps, scale, dtype)


def _check(
    logits: Tensor, bias: Tensor | None, top_k: int, scoring_func: str, n_group: int, topk_group: int
) -> None:  # fmt: skip
    if scoring_func not in SCORING_FUNCS:
        known = did_you_mean(scoring_func, SCORING_FUNCS)
        raise EffpassError(f"effpass::moe_router: scoring_func {scoring_func!r}{known}")
    if logits.dim() != 2 or not logits.is_floating_point():
        raise EffpassError(
            f"effpass::moe_router: logits are {str(logits.dtype).removeprefix('torch.')} {tuple(logits.shape)}",
            hint="logits are floating-point [N, E]",
        )
    experts = logits.shape[1]
    if bias is not None and bias.shape != (experts,):
        raise EffpassError(f"effpass::moe_router: the bias is {tuple(bias.shape)}, expected {(experts,)}")
    if bias is not None and scoring_func != "sigmoid":
        raise EffpassError(f"effpass::moe_router: a bias with {scoring_func} scores", hint="only sigmoid has a bias")
    if not 1 <= topk_group <= n_group or experts % n_group:
        raise EffpassError(
            f"effpass::moe_router: {topk_group} of {n_group} groups of {experts} experts",
            hint="1 <= topk_group <= n_group, and n_group divides the number of experts",
        )
    size = experts // n_group
    if not 1 <= top_k <= topk_group * size:
        raise EffpassError(
            f"effpass::moe_router: {top_k} experts of {topk_group * size} in {topk_group} groups of {size}"
        )
    if bias is not None and topk_group < n_group and size < 2:
        raise EffpassError("effpass::moe_router: with a bias, a group is scored by two experts, and each has one")


@moe_router.register_fake
def _(logits, bias, top_k, scoring_func, n_group, topk_group, norm_topk_prob, eps, scale, dtype):  # type: ignore[no-untyped-def]
    _check(logits, bias, top_k, scoring_func, n_group, topk_group)
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=dtype)


@moe_router.register_kernel("cuda")
def _(logits, bias, top_k, scoring_func, n_group, topk_group, norm_topk_prob, eps, scale, dtype):  # type: ignore[no-untyped-def]
    _check(logits, bias, top_k, scoring_func, n_group, topk_group)
    arguments = (logits, bias, top_k, scoring_func, n_group, topk_group, norm_topk_prob, eps, scale, dtype)
    kernels = triton_kernels("moe_router")
    fits = logits.shape[1] <= MAX_EXPERTS and top_k <= MAX_TOP_K
    if kernels and fits and has_kernel(logits.device, logits.dtype, logits.shape[0]):
        return kernels.moe_router(*arguments)
    return _moe_router(*arguments)


@register_flop_formula(torch.ops.effpass.moe_router)
def _(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 0
