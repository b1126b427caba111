"""What a rewrite did, and what it declined to do: counted, timed, printable, JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["PassReport", "Refusal", "Report"]


@dataclass(frozen=True)
class Refusal:
    """One candidate that a pass left alone.

    Attributes:
        node: the graph node, module or weight concerned.
        reason: why the pass stayed away.
        hint: what the user could change; empty when nothing.
    """

    node: str
    reason: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}" + (f" → {self.hint}" if self.hint else "")


def _signed(value: int, unit: str) -> str:
    """`-8400000 B` as ``-8.4 MB``."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:+.1f} {prefix}{unit}"
    return f"{value:+d} {unit}"


@dataclass
class PassReport:
    """One pass on one program or model.

    Attributes:
        name: registry key of the pass.
        exact: whether the rewrite keeps the model's meaning up to rounding.
        hits: number of places rewritten.
        refusals: candidates left alone, each with its reason.
        seconds: wall time of the pass.
        ops: operator counts, after minus before; zero entries are left out.
        flops: FLOPs of the program after minus before, at the traced sizes; None where not counted.
        weight_bytes: bytes of weights read by one call, after minus before; None where not counted.
        derived_bytes: bytes held beside the original weights for derived weights.
        max_difference: largest absolute output difference to the program before the pass, where asked for.
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

    def line(self) -> str:
        """One line for a person: what fired, or the commonest reason why nothing did."""
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
    """Everything that happened on the way from one graph (or model) to its rewritten form.

    Attributes:
        entrance: ``"model"``, ``"program"`` or ``"backend"``.
        passes: one entry per pass, in the order they ran.
        unrewritten: why the graph went on as it was, when it could not be brought into the dialect.
        generates: why the model's `generate` is transformers' own, where the decode engine can't run the model.
        compiled: names of passes that act on the graphs of this model, when it is called.
    """

    entrance: str
    passes: list[PassReport] = field(default_factory=list)
    unrewritten: str | None = None
    generates: str | None = None
    compiled: list[str] = field(default_factory=list)

    @property
    def hits(self) -> int:
        return sum(p.hits for p in self.passes)

    def lines(self) -> list[str]:
        if self.unrewritten:
            return [f"graph left as it was: {self.unrewritten}"]
        engine = [f"generate is transformers' own: {self.generates}"] if self.generates else []
        graphs = [f"{name}: acts on the model's graphs, when it is called" for name in self.compiled]
        return [p.line() for p in self.passes] + graphs + engine

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
