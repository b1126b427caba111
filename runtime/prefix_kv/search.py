"""The global threshold search of PrefixKV, which shares out a total over layers, and rounding that keeps the total.

Let C_l(K) be the share of layer l's attention that its K most important tokens receive. The search finds

    the largest p with Σ_l K_l(p) ≤ total,   K_l(p) = min { K : C_l(K) ≥ p }

This maximizes the share of attention in the layer that retains the smallest one (https://arxiv.org/abs/2412.03409,
section 3.2). Layers whose attention is spread over many tokens keep many, and layers that attend to few keep few.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effpass.core.errors import EffpassError

__all__ = ["apportion", "threshold_counts"]

_STEPS = 40  # bisection steps; 2^-40 is below the resolution of a sum in float32


def threshold_counts(mass: Tensor, totals: Sequence[int], low: Sequence[int], high: Tensor) -> list[list[int]]:
    """Find the number of tokens K_l that each layer keeps, for each sequence.

    Args:
        mass: `[B, L, S]`, cumulative importance C_l(1) ... C_l(S), ascending, the last one 1.
        totals: for each sequence, the number of tokens that its layers keep in total.
        low: for each layer, the minimum number of tokens.
        high: int64 `[B, L]`, number of tokens available.

    Returns:
        For each sequence, the counts of its layers, with `low ≤ K ≤ high`; their sum is the total, or the sum of `high`
        if that is smaller.

    Raises:
        EffpassError: if a total is below the sum of `low`.
    """
    mass = mass.double().contiguous()
    least = torch.tensor(low, device=mass.device).expand_as(high).minimum(high)
    wanted = torch.tensor(totals, device=mass.device)

    def counts(p: Tensor) -> Tensor:
        given = p[:, None, None].expand(*mass.shape[:2], 1).contiguous()
        return (torch.searchsorted(mass, given).squeeze(2) + 1).minimum(high).maximum(least)

    below = torch.zeros(len(mass), dtype=torch.float64, device=mass.device)
    above = torch.ones_like(below)
    for _ in range(_STEPS):
        middle = (below + above) / 2
        fits = counts(middle).sum(1) <= wanted
        below, above = below.where(~fits, middle), above.where(fits, middle)
    # Counts at the last two thresholds differ only by ties, whose tokens are shared out in proportion.
    fitting = counts(below)
    more = torch.where((above == 1)[:, None], high, counts(above)) - fitting
    found = []
    for base, extra, most, total, floor in zip(
        fitting.tolist(), more.tolist(), high.tolist(), totals, least.tolist(), strict=True
    ):
        tops = [b + e for b, e in zip(base, extra, strict=True)]
        if sum(tops) < min(total, sum(most)):  # the total exceeds the counts at p = 1: add tokens without attention
            base, tops = tops, most
        bottoms = base if sum(base) <= total else floor
        weights = [float(t) for t in tops]
        found.append(apportion(weights, total, bottoms, tops))
    return found


def apportion(
    weights: Sequence[float], total: int, low: Sequence[int], high: Sequence[int], page: int = 1
) -> list[int]:
    """Round λ · `weights` to integers whose sum is exactly `total`, or the sum of `high` if that is smaller.

    Args:
        weights: for each layer, the relative number of tokens to keep, in any unit.
        total: sum of the results.
        low: for each layer, the minimum.
        high: for each layer, the maximum.
        page: granularity; results are multiples of it, except those at a limit and one that takes the remainder.

    Raises:
        EffpassError: if `total` is below the sum of `low`.
    """
    total = min(total, sum(high))
    if sum(low) > total:
        raise EffpassError(f"{sum(low)} tokens are protected over all layers, and the budget is {total}")
    shares = _scaled(weights, total, low, high)
    found = [
        max(lo, min(hi, int(share + 1e-9) // page * page)) for share, lo, hi in zip(shares, low, high, strict=True)
    ]
    left = total - sum(found)
    while left > 0:
        order = sorted(range(len(found)), key=lambda i: (found[i] - shares[i], i))
        open_ = [i for i in order if found[i] < high[i]]
        for i in open_:
            step = min(left, high[i] - found[i], page - found[i] % page)
            found[i] += step
            left -= step
            if not left:
                break
    return found


def _scaled(weights: Sequence[float], total: int, low: Sequence[int], high: Sequence[int]) -> list[float]:
    """Return λ · `weights`, clamped to the limits, with λ such that the sum is `total`; zero weights count last."""
    smallest = min((w for w in weights if w > 0), default=1.0)
    positive = [max(w, smallest * 1e-9) for w in weights]

    def at(factor: float) -> list[float]:
        return [min(max(factor * w, lo), hi) for w, lo, hi in zip(positive, low, high, strict=True)]

    below, above = 0.0, 1.0
    while sum(at(above)) < total and above < 1e30:
        above *= 2
    for _ in range(200):
        middle = (below + above) / 2
        if sum(at(middle)) <= total:
            below = middle
        else:
            above = middle
    return at(below)
