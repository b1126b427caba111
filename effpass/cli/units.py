"""Numbers as people read them."""

from __future__ import annotations

import re

__all__ = ["COSTS", "bytes_", "count", "duration", "flops", "formula", "percent"]


def _scaled(value: float, unit: str) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{_three(value / factor)} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def _three(value: float) -> str:
    """Three significant digits, zeros at the end too, so that columns compare."""
    return f"{value:#.3g}".removesuffix(".")


def bytes_(value: float) -> str:
    """Bytes in units of powers of ten: ``"513 MB"``."""
    return _scaled(value, "B")


def flops(value: float) -> str:
    """``"340 MFLOP"``."""
    return _scaled(value, "FLOP")


def count(value: int) -> str:
    """``"1,024"``."""
    return f"{value:,}"


def duration(seconds: float) -> str:
    """``"1.69 ms"``."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor:
            return f"{_three(seconds / factor)} {unit}"
    return f"{_three(seconds * 1e6)} µs"


def percent(before: float, after: float) -> str:
    """The change: ``"-46 %"``; a dash where there is none."""
    if before == after:
        return "–"  # noqa: RUF001
    return "new" if before == 0 else f"{(after / before - 1) * 100:+.0f} %"


def formula(text: str) -> str:
    """A sympy expression as mathematics is written: ``512·batch·tokens²``."""
    return re.sub(r"\*\*2\b", "²", text).replace("*", "·")


# Costs of a stage of a workload: what it is called, its attribute, and how it is shown.
COSTS = (
    ("predicted time", "seconds", duration),
    ("bound", "bound_seconds", duration),
    ("FLOPs", "flops", flops),
    ("weights read", "weight_bytes", bytes_),
    ("cache read", "cache_bytes", bytes_),
    ("activations moved", "activation_bytes", bytes_),
    ("kernels", "kernels", count),
)
