"""Coefficients (a, b, c) of the Newton-Schulz steps  σ ← aσ + bσ³ + cσ⁵.

A composition of such odd quintics moves every singular value σ ∈ (0, 1] towards 1. There are two families:

* ``muon``: one triple for all steps; steep at zero, but not convergent: σ ends in 0.68 … 1.21.
* ``polar_express``: the quintic of each step is optimal for the interval that the preceding steps leave (Amsel et al.,
  arXiv 2505.16932). It is computed here with the Remez exchange algorithm, for any number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import isfinite, sqrt

import torch

from effpass.core.errors import EffpassError, did_you_mean

__all__ = ["MUON", "Coefficients", "band", "coefficients", "polar_express"]

Coefficients = tuple[tuple[float, float, float], ...]

MUON = (3.4445, -4.7750, 2.0315)

# Lower end of the interval that is mapped to 1. Smaller σ are regarded as noise in a matrix of Frobenius norm 1.
LOWER = 1e-3
# Minimum ratio of the lower to the upper end of a step's interval. Without it, the first steps are so steep that half
# precision overshoots.
CUSHION = 0.02
# All steps but the last divide their argument by this factor, so that σ stays inside the interval when rounded up.
SAFETY = 1.02


def coefficients(name: str | Sequence[Sequence[float]], steps: int) -> Coefficients:
    """Return the triples of `steps` steps.

    Args:
        name: ``"polar_express"``, ``"muon"``, or the triples themselves, one per step.
        steps: number of steps; ignored if triples are given.

    Raises:
        EffpassError: if the name is unknown, there are no steps, or a given triple does not consist of three finite
            numbers.
    """
    if not isinstance(name, str):
        given = tuple(tuple(float(x) for x in triple) for triple in name)
        if not given or any(len(triple) != 3 or not all(map(isfinite, triple)) for triple in given):
            raise EffpassError(
                f"Newton-Schulz coefficients {name!r} are not a list of (a, b, c)", hint="one triple of floats per step"
            )
        return given  # type: ignore[return-value]
    if steps < 1:
        raise EffpassError(f"Newton-Schulz needs at least one step, got steps={steps}", hint="steps=5 is usual")
    if name == "muon":
        return (MUON,) * steps
    if name == "polar_express":
        return polar_express(steps)
    raise EffpassError(f"unknown Newton-Schulz coefficients {name!r}{did_you_mean(name, ('muon', 'polar_express'))}")


@cache
def polar_express(steps: int, lower: float = LOWER, cushion: float = CUSHION, safety: float = SAFETY) -> Coefficients:
    """Return quintics whose composition maps [lower, 1] as close to 1 as possible (arXiv 2505.16932, theorem 3.1).

    Args:
        steps: number of quintics.
        lower: lower end of the interval.
        cushion: minimum ratio of the lower to the upper end of the interval of a step.
        safety: factor by which all steps but the last divide their argument.
    """
    found = []
    low, high = lower, 1.0
    for step in range(steps):
        a, b, c = _best_quintic(max(low, cushion * high), high)
        # The cushion may have shortened the interval; center the image of the whole interval on 1.
        centre = 2 / (_value(a, b, c, low) + _value(a, b, c, high))
        a, b, c = a * centre, b * centre, c * centre
        if step < steps - 1:
            a, b, c = a / safety, b / safety**3, c / safety**5
        found.append((a, b, c))
        low = _value(a, b, c, low)
        high = 2 - low
    return tuple(found)


def _value(a: float, b: float, c: float, x: float) -> float:
    return x * (a + x * x * (b + x * x * c))


def _best_quintic(low: float, high: float) -> tuple[float, float, float]:
    """Return the odd quintic closest to 1 on [low, high] in the maximum norm; its error equioscillates at 4 points."""
    if 1 - low / high < 1e-5:  # almost converged: the exchange is ill-conditioned, so the Padé step is used
        return 1.875 / high, -1.25 / high**3, 0.375 / high**5
    inner = [0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high]
    error = 0.0
    for _ in range(100):
        points = torch.tensor([low, *inner, high], dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        system = torch.stack([points, points**3, points**5, signs], dim=1)
        a, b, c, new = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        # The extrema of the quintic inside the interval: 5c·x⁴ + 3b·x² + a = 0.
        root = sqrt(9 * b * b - 20 * a * c)
        inner = [sqrt((-3 * b - root) / (10 * c)), sqrt((-3 * b + root) / (10 * c))]
        if abs(new - error) < 1e-15:
            break
        error = new
    return a, b, c


def band(triples: Coefficients, lower: float = LOWER, upper: float = 1.0) -> tuple[float, float]:
    """Return the smallest and the largest image of σ ∈ [lower, upper]: the range of an update's singular values."""
    sigma = torch.logspace(torch.log10(torch.tensor(lower)).item(), 0, 20001, dtype=torch.float64) * upper
    for a, b, c in triples:
        sigma = sigma * (a + sigma**2 * (b + sigma**2 * c))
    return sigma.min().item(), sigma.max().item()
