"""How long a layer of experts on several ranks should take, by its number of stages: experts and link, side by side.

    t(N) = around + max( N · stage,  Q₁ + C + Q₁,  2 N · start + 2 Q + C / N )
    Q = T (W - 1) (1 - (1 - 1/W)ᵏ) · D · b / rate     Q₁ = start + T (W - 1) (1 - (1 - 1/(W N))ᵏ) · D · b / rate

Q is what all rows to other ranks take, Q₁ those of the first or the last stage. C is what the experts of all stages
take, N times the fitted model of their kernel (:mod:`effpass.lowering.ops.moe_ffn_cost`) for a stage's load, and longer
by what it loses while rows are on the link. The maximum is over what may hold everything up: the host, the experts, the
link. One more stage costs kernels that start once more and meet fewer rows, `start` and `stage`: the least t(N) also
says whether stages are worth it (EPS-MoE, https://arxiv.org/abs/2410.12247, section 3.4). With equal tokens everywhere
nothing arrives, and the outputs are gathered:

    t(N) = around + max( N · stage,  C + Q₁,  N · start + Q + C / N ) + gathering     of T / W tokens a rank
    t(0) = all-reduce + experts of all tokens, which no rank waits for

Shapes: T tokens of a rank, k experts a token, E experts on W ranks, D model width, b bytes of a number, N stages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy

from effpass.lowering.ops.moe_ffn_cost import Fit, Shape, predict_load

__all__ = ["STAGE_KERNELS", "Link", "best_kernel", "best_stages", "divisors", "exchange", "predict", "seconds"]

#: Kernels of :data:`~effpass.lowering.ops.moe_ffn_cost.KERNELS` that compute a stage.
STAGE_KERNELS = ("grouped16", "grouped32", "grouped64", "grouped128", "library", "by_expert")


@dataclass(frozen=True)
class Link:
    """What was measured between ranks.

    Attributes:
        start: seconds of an exchange of nothing.
        rate: bytes/s that each rank sends to others while all do.
        around: seconds of a layer without stages: counts, order, the last sum.
        stage: seconds that one stage keeps the host busy.
        sharing: how many times longer experts take while rows are on the link; 1 or more.
    """

    start: float
    rate: float
    around: float
    stage: float
    sharing: float


_T, _K, _W, _N, _D, _B, _C = sympy.symbols("T k W N D b C", positive=True)
_START, _RATE, _AROUND, _STAGE, _SHARING = sympy.symbols("start rate around stage sharing", positive=True)
_ARGUMENTS = (_T, _K, _W, _N, _D, _B, _C, _START, _RATE, _AROUND, _STAGE, _SHARING)


@functools.cache
def seconds(replicated: bool) -> sympy.Expr:
    """The model of a layer over the symbols T, k, W, N, D, b, C and what a :class:`Link` holds."""
    tokens = _T / _W if replicated else _T

    def sent(share: sympy.Expr) -> sympy.Expr:
        return tokens * (_W - 1) * (1 - (1 - share) ** _K) * _D * _B / _RATE

    ends, every, ways = _START + sent(1 / (_W * _N)), sent(1 / _W), 1 if replicated else 2
    busy = ways * (_N * _START + every)
    experts = _C + (1 - 1 / _SHARING) * sympy.Max(0, busy - ways * ends)
    gathering = _START + _T * (_W - 1) / _W * _D * _B / _RATE if replicated else 0
    return _AROUND + sympy.Max(_N * _STAGE, ways * ends + experts, busy + _C / _N) + gathering


@functools.cache
def _function(replicated: bool) -> Callable[..., float]:
    return sympy.lambdify(_ARGUMENTS, seconds(replicated), modules=[{"Max": max}, "math"])


def best_kernel(pairs: float, met: float, shape: Shape, fitted: Fit, among: Sequence[str]) -> tuple[str, float]:
    """The kernel of `among` that should take least for a stage with a load, and its seconds."""
    return min(
        ((k, predict_load(k, pairs, met, shape, fitted.kernels[k], fitted.multiprocessors)) for k in among),
        key=lambda found: found[1],
    )


def exchange(rows: float, shape: Shape, link: Link) -> float:
    """Seconds until as many rows have arrived elsewhere."""
    return link.start + rows * shape.width * shape.element_size / link.rate


def predict(
    tokens: float,
    shape: Shape,
    ranks: int,
    stages: int,
    link: Link,
    fitted: Fit,
    *,
    replicated: bool = False,
    among: Sequence[str] = STAGE_KERNELS,
) -> float:
    """Seconds of a layer where all experts and all ranks are alike.

    Args:
        tokens: of this rank; of all ranks where they are `replicated`.
        shape: all E experts.
        ranks: W.
        stages: N; 0: without stages, for replicated tokens.
        link: between these ranks.
        fitted: the device.
        replicated: whether all ranks have the same tokens.
        among: kernels to choose from.
    """
    pairs, everybody = tokens * shape.each, tokens * ranks
    if replicated:
        pairs, everybody = pairs / ranks, tokens
    local = shape.experts // ranks
    met = local * (1 - (1 - min(shape.each / shape.experts, 1)) ** everybody)
    if stages == 0:
        reduced = 2 * tokens * (ranks - 1) / ranks
        return best_kernel(pairs, met, shape, fitted, among)[1] + exchange(reduced, shape, link)
    experts = stages * best_kernel(pairs / stages, met / stages, shape, fitted, among)[1]
    return float(
        _function(replicated)(
            tokens, shape.each, ranks, stages, shape.width, shape.element_size, experts,
            link.start, link.rate, link.around, link.stage, link.sharing,
        )
    )  # fmt: skip


def divisors(local: int) -> list[int]:
    """The numbers of stages that `local` experts can be computed in."""
    return [n for n in range(1, local + 1) if local % n == 0]


def best_stages(
    tokens: float,
    shape: Shape,
    ranks: int,
    link: Link,
    fitted: Fit,
    *,
    replicated: bool = False,
    among: Sequence[str] = STAGE_KERNELS,
) -> int:
    """The number of stages that should take least; 0 for replicated tokens that are best not cut into stages.

    More than the fewest only where they should take a tenth less: on four H200 the model was 6 to 11 points nearer to
    what one stage took than to what several did.
    """
    candidates = ([0] if replicated else []) + divisors(shape.experts // ranks)
    taken = {n: predict(tokens, shape, ranks, n, link, fitted, replicated=replicated, among=among) for n in candidates}
    best = min(candidates, key=taken.__getitem__)
    return best if taken[best] < 0.9 * taken[1] or best == 0 else 1
