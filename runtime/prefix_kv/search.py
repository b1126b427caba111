"""Sharing out a total over layers: the global threshold search of PrefixKV, and rounding that keeps the total.

With C_l(K) the share of layer l's attention that its K most important tokens receive, the search finds

    the largest p with Σ_l K_l(p) ≤ total,   K_l(p) = min { K : C_l(K) ≥ p }

so that the layer that retains least retains as much as possible (https://arxiv.org/abs/2412.03409, section 3.2). Layers
whose attention is spread out keep many tokens, layers that look at a few keep few.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effpass.core.errors import EffpassError

__all__ = ["apportion", "threshold_counts"]

_STEPS = 40  # of bisection: 2^-40 is below what a sum of float32 resolves


def threshold_counts(mass: Tensor, totals: Sequence[int], low: Sequence[int], high: Tensor) -> list[list[int]]:
    """K_l for each sequence.

    Args:
        mass: `[B, L, S]`, ascending: C_l(1) ... C_l(S), the last of them 1.
        totals: for each sequence, the sum of its counts.
        low: for each layer, what it keeps at least.
        high: int64 `[B, L]`: what there is to keep.

    Returns:
        For each sequence, the layers' counts: `low ≤ K ≤ high`, and in sum the total, or all there is.

    Raises:
        EffpassError: a total is below the sum of `low`.
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
    # Between the last two thresholds stand only ties: their tokens are shared out in proportion.
    fitting = counts(below)
    more = torch.where((above == 1)[:, None], high, counts(above)) - fitting
    found = []
    for base, extra, most, total, floor in zip(
        fitting.tolist(), more.tolist(), high.tolist(), totals, least.tolist(), strict=True
    ):
        tops = [b + e for b, e in zip(base, extra, strict=True)]
        if sum(tops) < min(total, sum(most)):  # the total asks for more than p = 1 gives: tokens that nobody looks at
            base, tops = tops, most
        bottoms = base if sum(base) <= total else floor
        weights = [float(t) for t in tops]
        found.append(apportion(weights, total, bottoms, tops))
    return found


def apportion(
    weights: Sequence[float], total: int, low: Sequence[int], high: Sequence[int], page: int = 1
) -> list[int]:
    """Whole numbers near λ · `weights` whose sum is `total` exactly, or the sum of `high` where that is less.

    Args:
        weights: for each layer, what it should keep, in any unit.
        total: the sum.
        low: for each layer, the least.
        high: for each layer, the most.
        page: numbers are multiples of it, but for those at a limit and one that takes what is left.

    Raises:
        EffpassError: `total` is below the sum of `low`.
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
    """λ · `weights` within the limits, with the sum `total`; layers of no weight come last."""
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
