"""Trainable sparse attention against dense sums in float64: cases for the CPU, the interpreter and a GPU."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call; `budget` in keys."""

    ends: tuple[int, ...] = (0, 100)
    heads: int = 2
    groups: int = 1
    key_size: int = 16
    value_size: int = 16
    block: int = 16
    budget: int = 48
    max_budget: int | None = None
    scale: float = 0.3

    @property
    def tokens(self) -> int:
        return self.ends[-1]

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of the output in float64, representable in `dtype`."""
        torch.manual_seed(self.tokens)
        q, k, v, d_out = (
            torch.randn(self.tokens, heads, size).to(dtype).double()
            for heads, size in (
                (self.heads, self.key_size), (self.groups, self.key_size), (self.groups, self.value_size),
                (self.heads, self.value_size),
            )
        )  # fmt: skip
        return q, k, v, d_out

    def cu_seqlens(self, device: str = "cpu") -> Tensor:
        return torch.tensor(self.ends, dtype=torch.int32, device=device)

    def budget_on(self, device: str = "cpu") -> Tensor:
        return torch.tensor(self.budget, dtype=torch.int32, device=device)


CASES = {
    "one sequence": Case((0, 50)),
    "grouped, packed, an empty sequence": Case((0, 30, 30, 47, 100), heads=6, groups=2, budget=40),
    "three heads, odd sizes": Case((0, 45), heads=3, groups=1, key_size=24, value_size=20, budget=64),
    "a budget of two blocks": Case((0, 70), heads=4, groups=2, budget=17, max_budget=64),
    "shorter than a block": Case((0, 3, 14), budget=32),
    "budget above the length": Case((0, 40, 55), heads=4, groups=4, budget=1000),
    "blocks of 32": Case((0, 33, 140), heads=4, groups=2, key_size=32, value_size=32, block=32, budget=96),
}


def mask_of(chosen: Tensor, ends: tuple[int, ...], block: int) -> Tensor:
    """bool [G, T, T], key by key: which keys a token reads."""
    groups, tokens, _ = chosen.shape
    mask, number = torch.zeros(groups, tokens, tokens, dtype=torch.bool), 0
    for begin, end in itertools.pairwise(ends):
        for start in range(begin, end, block):
            stop = min(start + block, end)
            for t in range(start, end):
                mask[:, t, start : min(stop, t + 1)] = (chosen[:, t].cpu() == number).any(-1)[:, None]
            number += 1
    return mask


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[T, H, V] by softmax over all keys of the mask; float64 in, differentiable."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    scores = torch.einsum("thk,shk->hts", q, k) * scale
    mask = mask.to(q.device).repeat_interleave(repeat, 0)
    return torch.einsum("hts,shv->thv", scores.masked_fill(~mask, float("-inf")).softmax(-1), v)


def expected(case: Case, mask: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients in float64 under `mask`."""
    *leaves, d_out = case.tensors(dtype)
    leaves = [x.requires_grad_() for x in leaves]
    out = dense(*leaves, mask, case.scale)
    found = torch.autograd.grad(out, leaves, d_out)
    return {"output": out.detach(), **dict(zip(("d q", "d k", "d v"), found, strict=True))}


def ratio(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference relative to that of `wanted`; NaN where `found` has one."""
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu()
    return float((found - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt().clamp(min=1e-30))


def brute_choice(case: Case, q: Tensor, k: Tensor) -> tuple[Tensor, float]:
    """bool [G, T, N] and the coverage, by loops over tokens and blocks."""
    count, repeat = -(-case.budget // case.block), case.heads // case.groups
    blocks = [
        (begin, start, min(start + case.block, end))
        for begin, end in itertools.pairwise(case.ends)
        for start in range(begin, end, case.block)
    ]
    chosen, held = torch.zeros(case.groups, case.tokens, len(blocks), dtype=torch.bool), []
    for g in range(case.groups):
        for t in range(case.tokens):
            own = next(n for n, (_, start, stop) in enumerate(blocks) if start <= t < stop)
            first = next(n for n, (begin, _, _) in enumerate(blocks) if begin == blocks[own][0])
            query = q[t, g * repeat : (g + 1) * repeat].mean(0)
            scores = {
                n: float(query @ k[blocks[n][1] : blocks[n][2], g].mean(0)) * case.scale for n in range(first, own + 1)
            }
            order = sorted(scores, key=lambda n: (n not in (first, own), -scores[n], n))
            chosen[g, t, order[:count]] = True
            weights = torch.tensor([scores[n] for n in range(first, own + 1)]).softmax(0)
            held.append(float(weights[chosen[g, t, first : own + 1]].sum()))
    return chosen, sum(held) / len(held)
