"""Cost model of the kernels of a mixture-of-experts layer: waves of tiles below a memory roof, fitted to a device.

    t(kernel) = start + call · A + ‖ bytes / bandwidth, Σ over both products of waves · tile FLOPs · S / rate ‖
    waves = ⌈tiles / S⌉,  tiles = A · max(1, P / (A · rows) + ½) · ⌈columns / tile columns⌉,  A = E · (1 - (1 - k / E)ᵀ)

A is the expected number of the E experts that T tokens with k experts each use if all are equally likely (EPS-MoE,
https://arxiv.org/abs/2410.12247, section 3), and P = T·k is the number of pairs. A tile costs the same however many of
its rows are used, and the last wave costs as much as a full one. ‖a, b‖ = (a⁴ + b⁴)^¼ is a smooth maximum: where memory
access and computation take about equally long, neither hides the other completely. `start`, `call`, `bandwidth` and
`rate` of each kernel are fitted to timings.

The library's grouped product differs in three ways. Its tiles come in pairs for the same expert, one on each of two
multiprocessors, and the second of a pair takes as long without rows:

    tiles = A · 2 E[⌈r / (2 rows)⌉] · ⌈columns / tile columns⌉

for the rows r of an expert in use, binomially distributed around P / A; the normal distribution stands for it. It has a
smaller tile for few rows per expert. And gather, gate and weighted sum are launches of their own, which no computation
hides: their bytes are added outside ‖·‖.

Mixed kernels compute experts with few rows in one launch, with low tiles, and the others in the next one, for the tiles
that the same distribution of rows gives each. The two fill each other's last waves, so that parts of waves count.

Shapes: T tokens, k experts per token, E experts, D hidden size, F intermediate size of an expert, S multiprocessors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy

from effpass.core.errors import EffpassError

__all__ = ["KERNELS", "Constants", "Fit", "Shape", "best", "fit", "predict", "predict_load", "seconds", "thresholds"]

#: Tiles by kernel: rows, and columns in the first and the second product. An expert takes the first tile that holds all
#: of its rows, or the last. A kernel without tiles reads the weights for each pair.
KERNELS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "rows": (),
    "grouped16": ((16, 64, 128),),
    "grouped32": ((32, 64, 128),),
    "grouped64": ((64, 64, 128),),
    "grouped128": ((128, 128, 256),),
    "mixed64": ((32, 64, 128), (64, 64, 128)),
    "mixed128": ((64, 64, 128), (128, 128, 256)),
    "library": ((128, 128, 256),),
    "by_expert": ((128, 256, 256),),
}
#: The tile of `torch._grouped_mm` on Hopper for up to so many rows per expert in the mean.
_LIBRARY_SMALL, _FEW_ROWS = (64, 64, 128), 128


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
        timings: what they were fitted to, by kernel: tokens, layer and seconds. Kept to compare models; not read back.
    """

    device: str
    dtype: str
    torch: str
    multiprocessors: int
    kernels: Mapping[str, Constants]
    timings: Mapping[str, Sequence[tuple[int, Shape, float]]] = field(default_factory=dict, compare=False, repr=False)


_T, _K, _E, _D, _F, _B, _S = sympy.symbols("T k E D F b S", positive=True)
_START, _CALL, _BANDWIDTH, _RATE = sympy.symbols("start call bandwidth rate", positive=True)
_P, _A = sympy.symbols("P A", positive=True)
_TILES = sympy.Function("tiles_of_an_expert")
_ALL = 1 << 30  # rows of a tile that holds whatever an expert has


@functools.lru_cache(maxsize=4096)
def _tiles_of_an_expert(mean: float, variance: float, rows: int, above: int) -> float:
    """Return the expected number of tiles of `rows` rows of an expert in use with about `mean` rows.

    It counts no tiles if it has not more than `above` rows.
    """
    if variance <= 0:
        return float(math.ceil(mean / rows)) if mean > above else 0.0
    if mean > 16 * max(rows, above):  # so many that every height of the last tile is about equally likely
        return (mean + (rows - 1) / 2) / rows
    wide = math.sqrt(2 * variance)
    most = math.ceil((mean + 5 * wide) / rows)
    more_than = [max(above, n * rows) for n in range(most + 1)]
    return sum(1.0 if least == 0 else math.erfc((least + 0.5 - mean) / wide) / 2 for least in more_than)


def _roof(memory: sympy.Expr, compute: sympy.Expr) -> sympy.Expr:
    return (memory**4 + compute**4) ** sympy.Rational(1, 4)


_OF_TOKENS, _OF_LOAD = (_T, _K, _E), (_P, _A)
_ARGUMENTS = (_D, _F, _B, _S, _START, _CALL, _BANDWIDTH, _RATE)


def _load(
    kernel: str, pairs: sympy.Expr, tokens: sympy.Expr, met: sympy.Expr, count: sympy.Expr, share: sympy.Expr
) -> sympy.Expr:
    """Return the model of a kernel for P pairs of T tokens that use A of E experts, each with a share of the tokens."""
    expert, activations = 3 * _D * _F * _B, pairs * (3 * _D + 2 * _F) * _B
    tiles = KERNELS[kernel]
    if not tiles:  # pairs share neither weights nor tiles
        return _START + _CALL * met + _roof(pairs * expert / _BANDWIDTH, 6 * pairs * _D * _F / _RATE)
    tile = tiles[-1]
    passes: sympy.Expr = sympy.Integer(0)
    if kernel == "library":  # gathered rows and both projections go through memory, half of that in products
        activations = pairs * (2 * _D + 3 * _F) * _B
        passes = activations + (pairs + tokens) * _D * _B
        small, large = (_waves(of, met * _in_pairs(pairs / met, share, of[0])) for of in (_LIBRARY_SMALL, tile))
        waves = sympy.Piecewise((small, sympy.Le(pairs / count, _FEW_ROWS)), (large, True))
    elif len(tiles) == 2:
        rows = pairs / met, pairs / met * (1 - share)
        low = tiles[0]
        high = met * _TILES(*rows, tile[0], low[0])
        few = met * (1 - _TILES(*rows, _ALL, low[0]))
        waves = _waves(low, few, whole=False) + _waves(tile, high, whole=False)
    else:
        if kernel == "by_expert":
            activations = pairs * (6 * _D + 8 * _F) * _B
        waves = _waves(tile, met * sympy.Max(1, pairs / (met * tile[0]) + sympy.Rational(1, 2)))
    memory = (met * expert + activations) / _BANDWIDTH
    return _START + _CALL * met + passes / _BANDWIDTH + _roof(memory, waves * _S / _RATE)


def _waves(tile: tuple[int, int, int], high: sympy.Expr, whole: bool = True) -> sympy.Expr:
    """Return the FLOPs of each multiprocessor in the waves of both products, with `high` tiles one above the other.

    If waves are not `whole`, a part of one costs as much less.
    """
    rows, of_first, of_second = tile
    # Each tile of the first product computes both gate and up.
    products = ((_F, of_first, 4 * rows * of_first * _D), (_D, of_second, 2 * rows * of_second * _F))
    waves = [(high * sympy.ceiling(size / wide) / _S, flops) for size, wide, flops in products]
    return sum((sympy.ceiling(count) if whole else count) * flops for count, flops in waves)


def _in_pairs(mean: sympy.Expr, share: sympy.Expr, rows: int) -> sympy.Expr:
    """Return the tiles of an expert, in pairs of which the second may have no rows."""
    return 2 * _TILES(mean, mean * (1 - share), 2 * rows, 0)


@functools.cache
def seconds(kernel: str) -> sympy.Expr:
    """Return the model of a kernel over T, k, E, D, F, b (bytes per element), S and the kernel's constants."""
    return _load(kernel, _T * _K, _T, _E * (1 - (1 - _K / _E) ** _T), _E, _K / _E)


@functools.cache
def _function(kernel: str, of_load: bool) -> Callable[..., float]:
    # Of a load, neither tokens nor unused experts are known: every pair is a token's only one, and experts have small
    # shares.
    model = _load(kernel, _P, _P, _A, _A, sympy.Integer(0)) if of_load else seconds(kernel)
    modules = [{"Max": max, "ceiling": math.ceil, _TILES.__name__: _tiles_of_an_expert}, "math"]
    return sympy.lambdify((*(_OF_LOAD if of_load else _OF_TOKENS), *_ARGUMENTS), model, modules=modules)


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
