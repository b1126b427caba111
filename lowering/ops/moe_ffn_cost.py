"""Cost model of the kernels of a mixture-of-experts layer: waves of tiles below a memory roof, fitted to a device.

    t(kernel) = start + call · A + ‖ bytes / bandwidth, Σ over both products of waves · tile FLOPs · S / rate ‖
    waves = ⌈tiles / S⌉,  tiles = A · max(1, P / (A · rows) + ½) · ⌈columns / tile columns⌉,  A = E · (1 - (1 - k / E)ᵀ)

A is the expected number of the E experts that T tokens with k experts each use if all are equally likely (EPS-MoE,
https://arxiv.org/abs/2410.12247, section 3), and P = T·k is the number of pairs. A tile costs the same however many of
its rows are used, and the last wave costs as much as a full one. ‖a, b‖ = (a⁴ + b⁴)^¼ is a smooth maximum: where memory
access and computation take about equally long, neither hides the other completely. `start`, `call`, `bandwidth` and
`rate` of each kernel are fitted to timings.

Shapes: T tokens, k experts per token, E experts, D hidden size, F intermediate size of an expert, S multiprocessors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy

from effpass.core.errors import EffpassError

__all__ = ["KERNELS", "Constants", "Fit", "Shape", "best", "fit", "predict", "predict_load", "seconds", "thresholds"]

#: Rows of a tile, and its columns in the first and the second product, by kernel; None for a kernel without tiles,
#: which reads the weights for each pair.
KERNELS: dict[str, tuple[int, int, int] | None] = {
    "rows": None,
    "grouped16": (16, 64, 128),
    "grouped32": (32, 64, 128),
    "grouped64": (64, 64, 128),
    "grouped128": (128, 128, 256),
    "library": (128, 256, 256),
    "by_expert": (128, 256, 256),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer of experts.

    Attributes:
        each: number of experts per token, k.
        experts: number of experts E.
        width: hidden size D.
        inner: intermediate size F of an expert.
        element_size: bytes per element.
    """

    each: int
    experts: int
    width: int
    inner: int
    element_size: int = 2


@dataclass(frozen=True)
class Constants:
    """Constants of one kernel on one device.

    Attributes:
        start: seconds to start.
        call: seconds per expert in use.
        bandwidth: memory bandwidth in bytes/s.
        rate: FLOP/s.
    """

    start: float
    call: float
    bandwidth: float
    rate: float


@dataclass(frozen=True)
class Fit:
    """Constants fitted to a device.

    Attributes:
        device: name of the device, as the driver gives it.
        dtype: dtype of the layers.
        torch: version of torch used for the timings.
        multiprocessors: number of multiprocessors S.
        kernels: constants by name of :data:`KERNELS`.
    """

    device: str
    dtype: str
    torch: str
    multiprocessors: int
    kernels: Mapping[str, Constants]


_T, _K, _E, _D, _F, _B, _S = sympy.symbols("T k E D F b S", positive=True)
_START, _CALL, _BANDWIDTH, _RATE = sympy.symbols("start call bandwidth rate", positive=True)
_P, _A = sympy.symbols("P A", positive=True)


def _roof(memory: sympy.Expr, compute: sympy.Expr) -> sympy.Expr:
    return (memory**4 + compute**4) ** sympy.Rational(1, 4)


_OF_TOKENS, _OF_LOAD = (_T, _K, _E), (_P, _A)
_ARGUMENTS = (_D, _F, _B, _S, _START, _CALL, _BANDWIDTH, _RATE)


def _load(kernel: str, pairs: sympy.Expr, met: sympy.Expr) -> sympy.Expr:
    """Return the model of a kernel for P pairs that use A experts."""
    expert, activations = 3 * _D * _F * _B, pairs * (3 * _D + 2 * _F) * _B
    tile = KERNELS[kernel]
    if tile is None:  # pairs share neither weights nor tiles
        return _START + _CALL * met + _roof(pairs * expert / _BANDWIDTH, 6 * pairs * _D * _F / _RATE)
    rows, of_first, of_second = tile
    high = met * sympy.Max(1, pairs / (met * rows) + sympy.Rational(1, 2))
    # Each tile of the first product computes both gate and up.
    products = ((_F, of_first, 4 * rows * of_first * _D), (_D, of_second, 2 * rows * of_second * _F))
    waves = sum(sympy.ceiling(high * sympy.ceiling(size / wide) / _S) * flops for size, wide, flops in products)
    if kernel in ("library", "by_expert"):  # gathered rows and both projections go through memory
        activations = pairs * (6 * _D + 8 * _F) * _B
    return _START + _CALL * met + _roof((met * expert + activations) / _BANDWIDTH, waves * _S / _RATE)


@functools.cache
def seconds(kernel: str) -> sympy.Expr:
    """Return the model of a kernel over T, k, E, D, F, b (bytes per element), S and the kernel's constants."""
    return _load(kernel, _T * _K, _E * (1 - (1 - _K / _E) ** _T))


@functools.cache
def _function(kernel: str, of_load: bool) -> Callable[..., float]:
    arguments, model = (_OF_LOAD, _load(kernel, _P, _A)) if of_load else (_OF_TOKENS, seconds(kernel))
    return sympy.lambdify((*arguments, *_ARGUMENTS), model, modules=[{"Max": max, "ceiling": math.ceil}, "math"])


def predict(kernel: str, tokens: int, shape: Shape, constants: Constants, multiprocessors: int) -> float:
    """Predict the seconds of a layer with `tokens` tokens and equally likely experts."""
    load = (tokens, min(shape.each, shape.experts), shape.experts)
    return _evaluate(kernel, False, load, shape, constants, multiprocessors)


def predict_load(
    kernel: str, pairs: float, met: float, shape: Shape, constants: Constants, multiprocessors: int
) -> float:
    """Predict the seconds of a layer with `pairs` pairs that use `met` experts (more than 0)."""
    return _evaluate(kernel, True, (pairs, met), shape, constants, multiprocessors)


def _evaluate(
    kernel: str, of_load: bool, load: tuple[float, ...], shape: Shape, constants: Constants, multiprocessors: int
) -> float:
    return float(
        _function(kernel, of_load)(
            *load, shape.width, shape.inner, shape.element_size, multiprocessors,
            constants.start, constants.call, constants.bandwidth, constants.rate,
        )
    )  # fmt: skip


def best(tokens: int, shape: Shape, fitted: Fit, among: Iterable[str]) -> str:
    """Return the kernel among `among` with the smallest predicted time."""
    return min(
        (name for name in among if name in fitted.kernels),
        key=lambda name: predict(name, tokens, shape, fitted.kernels[name], fitted.multiprocessors),
    )


def thresholds(shape: Shape, fitted: Fit, among: Sequence[str], most: int = 1 << 16) -> list[tuple[int, str]]:
    """Return from how many tokens on which kernel is best: (1, kernel), (tokens, next kernel), … up to `most`.

    One more wave can make a kernel slower than the next one for a few tokens only, so that a kernel may occur twice.
    """
    sizes = sorted({round(2 ** (step / 8)) for step in range(8 * most.bit_length())})
    found: list[tuple[int, str]] = []
    before = 0
    for tokens in (n for n in sizes if n <= most):
        name = best(tokens, shape, fitted, among)
        if not found or found[-1][1] != name:
            low, high = before, tokens  # bisect for the change between two sizes
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if best(middle, shape, fitted, among) == name else (middle, high)
            found.append((high, name))
        before = tokens
    return found


def fit(kernel: str, timings: Sequence[tuple[int, Shape, float]], multiprocessors: int, start: Constants) -> Constants:
    """Fit the constants of a kernel to `timings`, by least squares of the logarithms of predicted and measured seconds.

    Constants that the timings do not determine stay near `start`: a change by a factor of e counts as much as 5 % in
    one timing.

    Args:
        kernel: a name of :data:`KERNELS`.
        timings: tokens, layer and measured seconds; at least as many entries as constants.
        multiprocessors: number of multiprocessors S.
        start: initial constants, to which the fit is regularized.

    Raises:
        EffpassError: if there are fewer timings than constants, or one is not positive.
    """
    if len(timings) < 4 or any(not t > 0 for _, _, t in timings):
        raise EffpassError(
            f"{len(timings)} timings of {kernel} with a least of {min((t for *_, t in timings), default=0)} s",
            hint="give at least four, all positive",
        )

    def loss(constants: Constants) -> float:
        far = sum(math.log(getattr(constants, name) / getattr(start, name)) ** 2 for name in names)
        return 3e-3 * far + sum(
            math.log(predict(kernel, n, s, constants, multiprocessors) / t) ** 2 for n, s, t in timings
        )

    names = ("start", "call", "bandwidth", "rate")
    # Coordinate descent with decreasing steps; the model is monotone in each constant.
    found, least, step = start, loss(start), 1.0
    while step > 1e-3:
        moved = False
        for name in names:
            for factor in (math.exp(step), math.exp(-step)):
                other = replace(found, **{name: getattr(found, name) * factor})
                if (value := loss(other)) < least:
                    found, least, moved = other, value, True
        step = step if moved else step / 2
    return found
