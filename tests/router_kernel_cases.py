"""The kernel of routing against loops over experts: on a GPU, or, run as a program, without one.

`python router_kernel_cases.py interpret` computes the cases through Triton's interpreter; `... compile` compiles the
kernel at the sizes of real models for a GPU that is not there. Both print JSON.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """Arguments of `effpass::moe_router`; logits are random, in part equal, with the rows `rows` in front."""

    tokens: int
    experts: int
    top_k: int
    scoring_func: str = "softmax"
    bias: bool = False
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    eps: float = 0.0
    scale: float = 1.0
    rows: tuple[tuple[float, ...], ...] = ()

    def arguments(self, dtype: torch.dtype, device: Any, weights: torch.dtype | None = None) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(self.tokens * self.experts + self.top_k)
        logits = torch.randn(self.tokens, self.experts, generator=generator) * 4
        logits[1::3] = (logits[1::3] / 4).round()  # many equal ones
        for number, row in enumerate(self.rows):
            logits[number] = torch.tensor(row).repeat(self.experts)[: self.experts]
        bias = torch.randn(self.experts, generator=generator) if self.bias else None
        if bias is not None:
            bias[::2] = bias[::2].round()
            bias = bias.to(device)
        return (logits.to(device, dtype), bias, *self.numbers, weights or dtype)

    @property
    def numbers(self) -> tuple[Any, ...]:
        numbers = (self.top_k, self.scoring_func, self.n_group, self.topk_group, self.norm_topk_prob)
        return (*numbers, self.eps, self.scale)


DEEPSEEK: dict[str, Any] = {"scoring_func": "sigmoid", "bias": True, "eps": 1e-20, "scale": 2.5}
CASES = {
    "Mixtral, one token": Case(1, 8, 2),
    "Qwen3, no norm": Case(33, 128, 8, norm_topk_prob=False),
    "60 experts": Case(5, 60, 4, norm_topk_prob=False),
    "16 of 65 experts": Case(3, 65, 16, scale=0.5),
    "one expert": Case(2, 1, 1),
    "no token": Case(0, 64, 4, **DEEPSEEK),
    "GLM-4.7-Flash": Case(33, 64, 4, **DEEPSEEK),
    "DeepSeek-V3": Case(5, 256, 8, n_group=8, topk_group=4, **DEEPSEEK),
    "groups of odd sizes": Case(9, 65, 6, n_group=5, topk_group=3, **DEEPSEEK),
    "DeepSeek-V2": Case(9, 160, 6, n_group=8, topk_group=3, norm_topk_prob=False, scale=16.0),
    "sigmoid without a bias": Case(4, 12, 3, scoring_func="sigmoid", n_group=4, topk_group=2, norm_topk_prob=False),
    "1000 experts": Case(2, 1000, 32, **DEEPSEEK),
    "equal logits": Case(4, 60, 4, rows=((0.0,), (-0.0, 0.0), (7.0, 7.0, 1.0), (1e4,))),
    "equal logits, groups": Case(3, 32, 8, n_group=4, topk_group=2, scoring_func="sigmoid", rows=((0.0,), (2.0, 3.0))),
    "large logits": Case(5, 9, 3, rows=((1e30, -1e30), (200.0, -200.0, 100.0), (-1e30,), (88.0, -88.0), (1e-30,))),
    "large logits, sigmoid": Case(3, 18, 3, n_group=3, topk_group=2, **DEEPSEEK, rows=((1e30, -1e30), (-INF, 1.0))),
    "infinities": Case(3, 9, 4, rows=((-INF, 1.0, 2.0), (INF, 1.0), (-INF,))),
    "NaN": Case(3, 9, 4, rows=((NAN, 1.0, 2.0, NAN), (NAN,), (1.0, INF, -INF, NAN))),
    "NaN, groups": Case(3, 20, 4, n_group=5, topk_group=2, **DEEPSEEK, rows=((1.0, 2.0, NAN), (NAN,), (-INF, NAN))),
}


def by_loops(case: Case, logits: Tensor, bias: Tensor | None) -> tuple[list[list[int]], Tensor]:
    """Experts by sorting lists, with c as the operator is specified to compare it; weights in float64."""
    wide = logits.float().cpu()
    compared = wide if bias is None else wide.sigmoid() + bias.float().cpu()
    scores = wide.double().softmax(-1) if case.scoring_func == "softmax" else wide.double().sigmoid()
    size = case.experts // case.n_group

    def order(value: float) -> tuple[bool, float]:
        return (not math.isnan(value), -value if not math.isnan(value) else 0.0)

    chosen: list[list[int]] = []
    for row in compared.tolist():
        groups = []
        for group in range(case.n_group):
            best = sorted(row[group * size : (group + 1) * size], key=order)
            score = best[0] if bias is None or case.n_group == 1 else float(torch.tensor(best[0]) + best[1])
            groups.append((order(score), group))
        kept = {group for _, group in sorted(groups)[: case.topk_group]}
        members = [index for index in range(case.experts) if index // size in kept]
        chosen.append(sorted(members, key=lambda index: (order(row[index]), index))[: case.top_k])
    weights = scores.gather(1, torch.tensor(chosen, dtype=torch.long).view(-1, case.top_k))
    if case.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + case.eps)
    return chosen, weights * case.scale


def errors(name: str, run: Callable[..., Any], dtype: torch.dtype, device: Any, weights: torch.dtype) -> dict[str, Any]:
    """Tokens with other experts, and the error of the weights relative to the largest; NaN where only one is NaN."""
    case = CASES[name]
    arguments = case.arguments(dtype, device, weights)
    got = run(*arguments)
    chosen, expected = by_loops(case, *arguments[:2])
    found = got[1].double().cpu()
    assert got[0].dtype == torch.int64
    assert got[1].dtype == weights
    both = found.isnan() & expected.isnan()
    difference = (found - expected).masked_fill(both, 0.0).abs()
    largest = expected.nan_to_num(0.0).abs().amax() if expected.numel() else torch.ones(())
    error = float(difference.amax() / largest.clamp(min=1e-30)) if expected.numel() else 0.0
    return {"experts": sum(a != b for a, b in zip(got[0].tolist(), chosen, strict=True)), "weights": error}


def interpret() -> dict[str, dict[str, Any]]:
    """Errors of all cases in float32, and of some in bfloat16; outputs start as NaN."""
    from triton_interpreter import check_accesses, correct_bfloat16, set_up

    set_up()
    correct_bfloat16()
    check_accesses()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills empty tensors with NaN, or the largest integer
    run = importlib.import_module("effpass.lowering.kernels.moe_router").moe_router
    found = {name: errors(name, run, torch.float32, "cpu", torch.float32) for name in CASES}
    for name in ("60 experts", "DeepSeek-V3"):
        found[f"{name}, bfloat16"] = errors(name, run, torch.bfloat16, "cpu", torch.bfloat16)
    return found


def compile_all() -> dict[str, int]:
    """Bytes of shared memory of the kernel, compiled for compute capability 9.0."""
    from offline_kernels import compile_instead

    kernels = importlib.import_module("effpass.lowering.kernels.moe_router")
    launches = compile_instead([kernels], ["_route"])
    for dtype, case in (
        (torch.bfloat16, Case(1, 128, 8)),
        (torch.float32, Case(1, 64, 4, **DEEPSEEK)),
        (torch.float32, Case(1, 256, 8, n_group=8, topk_group=4, **DEEPSEEK)),
        (torch.float32, Case(1, 160, 6, n_group=8, topk_group=3, norm_topk_prob=False)),
        (torch.float32, Case(1, 1024, 32, **DEEPSEEK)),
    ):
        kernels.moe_router(*case.arguments(dtype, "cpu", torch.bfloat16))
    return {f"{name}{number}": size for number, (name, size) in enumerate(launches)}


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads TRITON_INTERPRET when it is imported"
        print(json.dumps(interpret()))
    else:
        print(json.dumps(compile_all()))
