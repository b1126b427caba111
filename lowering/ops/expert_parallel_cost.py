"""Cost model of an expert-parallel layer as a function of its number of stages, with computation and link overlapped.

    t(N) = around + max( N · stage,  Q₁ + C + Q₁,  2 N · start + 2 Q + C / N )
    Q = T (W - 1) (1 - (1 - 1/W)ᵏ) · D · b / rate     Q₁ = start + T (W - 1) (1 - (1 - 1/(W N))ᵏ) · D · b / rate

Q is the time to send all rows (a row is a token sent to one rank) to other ranks, Q₁ that of the first or the last
stage. C is the time of the experts of all stages: N times the fitted model of their kernel
(:mod:`effpass.lowering.ops.moe_ffn_cost`) at a stage's load, plus what they lose while rows are on the link. The
maximum is over the possible bottlenecks: host, experts and link. Each additional stage costs `start` and `stage` and
runs kernels on fewer rows, so that the smallest t(N) also tells whether stages pay off (EPS-MoE,
https://arxiv.org/abs/2410.12247, section 3.4). With the same tokens on every rank nothing is dispatched, and the
outputs are gathered:

    t(N) = around + max( N · stage,  C + Q₁,  N · start + Q + C / N ) + gathering     of T / W tokens per rank
    t(0) = all-reduce + experts of all tokens, without an exchange of counts

Shapes: T tokens of a rank, k experts per token, E experts on W ranks, D hidden size, b bytes per element, N stages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy

from effpass.lowering.ops.moe_ffn_cost import Fit, Shape, predict_load

__all__ = ["STAGE_KERNELS", "Link", "best_kernel", "best_stages", "divisors", "exchange", "predict", "seconds"]

#: Kernels of :data:`~effpass.lowering.ops.moe_ffn_cost.KERNELS` that can compute a stage.
STAGE_KERNELS = ("grouped16", "grouped32", "grouped64", "grouped128", "library", "by_expert")


@dataclass(frozen=True)
class Link:
    """Measurements of the link between ranks.

    Attributes:
        start: seconds of an empty exchange.
        rate: bytes/s that each rank sends to others while all ranks send.
        around: seconds of a layer outside of its stages: exchange of counts, ordering, final sum.
        stage: seconds that the host is busy per stage.
        sharing: factor by which experts slow down while rows are on the link; at least 1.
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
    """Return the model of a layer, over the symbols T, k, W, N, D, b, C and the fields of :class:`Link`."""
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
    """Return the kernel among `among` with the smallest predicted time for a stage's load, and that time in seconds."""
    return min(
        ((k, predict_load(k, pairs, met, shape, fitted.kernels[k], fitted.multiprocessors)) for k in among),
        key=lambda found: found[1],
    )


def exchange(rows: float, shape: Shape, link: Link) -> float:
    """Predict the seconds until `rows` rows have arrived on other ranks."""
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
    """Predict the seconds of a layer in which all experts and all ranks have equal loads.

    Args:
        tokens: number of tokens of each rank; of all ranks together if `replicated`.
        shape: the layer, with all E experts.
        ranks: number of ranks W.
        stages: number of stages N; 0 for replicated tokens without an exchange.
        link: measurements of the link between the ranks.
        fitted: fitted constants of the device.
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
    """Return the possible numbers of stages of `local` experts."""
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
    """Return the best number of stages by prediction; 0 if replicated tokens are best not cut into stages.

    More than one stage is chosen only if the prediction is more than a tenth below that of one stage: on four H200 the
    model was 6 to 11 percentage points closer to the measured time of one stage than to that of several.
    """
    candidates = ([0] if replicated else []) + divisors(shape.experts // ranks)
    taken = {n: predict(tokens, shape, ranks, n, link, fitted, replicated=replicated, among=among) for n in candidates}
    best = min(candidates, key=taken.__getitem__)
    return best if taken[best] < 0.9 * taken[1] or best == 0 else 1
