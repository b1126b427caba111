"""Reports of what passes did to a model or program, and what they left alone, for people and as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["PassReport", "Refusal", "Report"]


@dataclass(frozen=True)
class Refusal:
    """One candidate that a pass left alone.

    Attributes:
        node: name of the graph node, module or weight.
        reason: why the pass did not rewrite it.
        hint: what the user could change so that the pass rewrites it; empty for no hint.
    """

    node: str
    reason: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}" + (f" → {self.hint}" if self.hint else "")


def _signed(value: int, unit: str) -> str:
    """Format a change with its sign and an SI prefix: -8400000 with the unit ``B`` gives ``-8.4 MB``."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:+.1f} {prefix}{unit}"
    return f"{value:+d} {unit}"


@dataclass
class PassReport:
    """What one pass did to one program or model.

    Attributes:
        name: registry key of the pass.
        exact: whether the rewritten model computes the same function up to rounding.
        hits: number of places rewritten.
        refusals: candidates that were left alone, each with the reason.
        seconds: wall time of the pass.
        ops: change in the number of nodes of each operator (after minus before), without zeros.
        flops: change in the FLOPs of the program at the traced sizes; None when not counted.
        weight_bytes: change in the bytes of weights that one call reads; None when not counted.
        derived_bytes: bytes of derived weights held in addition to the original weights.
        max_difference: largest absolute difference between the outputs before and after the pass; None unless the
            recipe requests ``verify``.
        note: what else a reader must know about the places that were rewritten; empty for nothing.
    """

    name: str
    exact: bool
    hits: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    seconds: float = 0.0
    ops: dict[str, int] = field(default_factory=dict)
    flops: int | None = None
    weight_bytes: int | None = None
    derived_bytes: int = 0
    max_difference: float | None = None
    note: str = ""

    def line(self) -> str:
        """One line of text: what was rewritten, or the most common reason why nothing was."""
        if self.hits:
            gain = ""
            if self.weight_bytes:
                gain += f", {_signed(self.weight_bytes, 'B')} of weights read a call"
            if self.flops:
                gain += f", {_signed(self.flops, 'FLOP')} a call"
            if self.max_difference is not None:
                gain += f", outputs differ by at most {self.max_difference:.2g}"
            return f"{self.name}: {self.hits} rewritten{gain}"
        if not self.refusals:
            return f"{self.name}: nothing to rewrite"
        (reason, count), *_ = Counter(r.reason for r in self.refusals).most_common(1)
        first = next(r for r in self.refusals if r.reason == reason)
        hint = f" → {first.hint}" if first.hint else ""
        return f"{self.name}: nothing rewritten; {count} x {reason} (first: {first.node}){hint}"


@dataclass
class Report:
    """What all passes did to one graph or model.

    Attributes:
        entrance: form in which the model reached the passes: ``"model"``, ``"program"`` or ``"backend"``.
        passes: one entry per pass, in the order in which they ran.
        unrewritten: why the graph was compiled unchanged; None unless it could not be translated to the dialect.
        generates: why `generate` of the model is that of transformers; None unless the decode engine can't run the
            model.
        compiled: names of the passes that act on the graphs of this model when its calls are compiled.
        changed: settings of the model that were changed so that these passes recognize its graphs.
    """

    entrance: str
    passes: list[PassReport] = field(default_factory=list)
    unrewritten: str | None = None
    generates: str | None = None
    compiled: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    @property
    def hits(self) -> int:
        """Number of places that all passes rewrote together."""
        return sum(p.hits for p in self.passes)

    def lines(self) -> list[str]:
        """The report as lines of text."""
        if self.unrewritten:
            return [f"graph left as it was: {self.unrewritten}"]
        engine = [f"generate is transformers' own: {self.generates}"] if self.generates else []
        graphs = [f"{name}: acts on the model's graphs, when it is called" for name in self.compiled]
        passes = [text for p in self.passes for text in (p.line(), p.note and f"{p.name}: {p.note}") if text]
        return [*passes, *self.changed, *graphs, *engine]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
