"""The roofline plot of a report, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from effpass.cli import units
from effpass.cli.html import Markup, join, tag

__all__ = ["Point", "roofline"]

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 44, 44, 56


@dataclass(frozen=True)
class Point:
    """Kernels that do the same: FLOPs and bytes over all of them, and their predicted time."""

    name: str
    when: str
    flops: int
    bytes: int
    seconds: float


def roofline(points: Sequence[Point], ceilings: dict[str, Any], title: str) -> Markup:
    """FLOP/s over FLOPs per byte, logarithmic on both axes; the area of a point is its share of the time.

    Args:
        points: `when` is ``"before"`` (hollow) or ``"after"`` (filled).
        ceilings: as in the JSON report.
        title: what the plot shows, read aloud in place of it.
    """
    points = [p for p in points if p.flops and p.bytes and p.seconds]
    ridge = ceilings["peak"] / ceilings["bandwidth"]
    intensities = [p.flops / p.bytes for p in points] + [ridge * 8, 0.5]
    rates = [p.flops / p.seconds for p in points] + [ceilings["peak"], ceilings["bandwidth"] * min(intensities)]
    axes = _Axes(*_decades(intensities), *_decades(rates))
    longest = max((p.seconds for p in points), default=1.0)
    low, high = 10**axes.x0, 10**axes.x1
    roofs = [
        _roof(axes, ceilings["bandwidth"], ceilings["peak"], low, high, "roof"),
        _roof(axes, ceilings["matvec_bandwidth"], ceilings["peak"], low, high, "roof inner"),
    ]
    return tag(
        "svg",
        tag("title", title),
        *axes.grid(),
        *roofs,
        *(_dot(axes, p, longest) for p in sorted(points, key=lambda p: -p.seconds)),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        class_="plot",
    )


def _decades(values: Sequence[float]) -> tuple[int, int]:
    return math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 0.02)


@dataclass(frozen=True)
class _Axes:
    x0: int
    x1: int
    y0: int
    y1: int

    def x(self, value: float) -> float:
        return _LEFT + (math.log10(value) - self.x0) / (self.x1 - self.x0) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (math.log10(value) - self.y0) / (self.y1 - self.y0) * (_HEIGHT - _TOP - _BOTTOM)

    def grid(self) -> Iterator[Markup]:
        """Lines at powers of ten, and what they stand for."""
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        for power in range(self.x0, self.x1 + 1):
            at = f"{self.x(10.0**power):.1f}"
            yield tag("line", x1=at, x2=at, y1=_TOP, y2=bottom, class_="grid")
            yield tag("text", f"{10.0**power:g}", x=at, y=bottom + 20, text_anchor="middle")
        for power in range(self.y0, self.y1 + 1):
            at = f"{self.y(10.0**power):.1f}"
            label = units.flops(10.0**power).partition(" ")
            yield tag("line", x1=_LEFT, x2=right, y1=at, y2=at, class_="grid")
            words = f"{float(label[0]):g} {label[2].removesuffix('FLOP')}"
            yield tag("text", words, x=_LEFT - 8, y=float(at) + 4, text_anchor="end")
        yield tag("text", "FLOPs per byte moved", x=(_LEFT + right) / 2, y=_HEIGHT - 8, text_anchor="middle")
        yield tag("text", "FLOP/s", x=8, y=20)


def _roof(axes: _Axes, bandwidth: float, peak: float, low: float, high: float, class_: str) -> Markup:
    """min(bandwidth · intensity, peak)."""
    start = max(low, 10**axes.y0 / bandwidth)
    corners = [(start, start * bandwidth), (peak / bandwidth, peak), (high, peak)]
    path = " ".join(f"{'M' if i == 0 else 'L'}{axes.x(x):.1f} {axes.y(y):.1f}" for i, (x, y) in enumerate(corners))
    return tag("path", d=path, class_=class_)


def _dot(axes: _Axes, point: Point, longest: float) -> Markup:
    radius = 3 + 9 * math.sqrt(point.seconds / longest)
    words = (
        f"{point.name} ({point.when}): {units.duration(point.seconds)}, {units.flops(point.flops / point.seconds)}/s"
    )
    x, y = axes.x(point.flops / point.bytes), axes.y(point.flops / point.seconds)
    return tag(
        "circle",
        join([tag("title", words)]),
        cx=f"{x:.1f}",
        cy=f"{y:.1f}",
        r=f"{radius:.1f}",
        class_=f"dot {point.when}",
    )
