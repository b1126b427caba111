"""Dynamic sparsity tuning: budgets that let the ranks of a step arrive together. Pure functions of numbers.

    A         = agg over the group of t_i(k₀)                     agg: mean, min or max; the anchor
    shrinking   t_i(k₀) > A:  k = max{k : t_i(k) ≤ A},   at least  min{k : C_iℓ(k) ≥ (1 − p) C_iℓ(k₀)}
    A'        = max(A, slowest of the group after shrinking)
    growing     t_i(k₀) ≤ A:  k = max{k : t_i(k) ≤ A'},  at most   min{k : C_iℓ(k) ≥ min(1, (1 + p) C_iℓ(k₀))}

`i` is a micro-batch, `ℓ` a layer. `C(k)` is the share of the router's weight that lies on the `k` best keys' blocks, in
the mean over queries: the guard. What waits for each other is a group. Source: SparseBalance
(https://arxiv.org/abs/2604.13847). The paper says nothing of two cases. Where no budget is fast enough, the smallest is
wanted, and the guard has the last word: the micro-batch stays slower than the anchor. And as the others wait for it
then, they may grow until its time instead of the anchor's, which takes no longer.

Shapes: R ranks, M micro-batches of each in a step, L layers, K budgets that a layer may have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from effpass.core.errors import EffpassError, did_you_mean

__all__ = [
    "Anchor",
    "Direction",
    "Tuning",
    "Waits",
    "budgets_around",
    "group_seconds",
    "guard",
    "imbalance",
    "micro_batch_seconds",
    "slowest",
    "tune",
]

Anchor = Literal["mean", "min", "max"]
Direction = Literal["both", "down", "up", "none"]
Waits = Literal["micro_step", "step", "pipeline"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_AGGREGATE: dict[str, Any] = {"mean": np.mean, "min": np.min, "max": np.max}


@dataclass(frozen=True)
class Tuning:
    """How budgets may move.

    Attributes:
        budgets: that a layer may have, in keys, ascending.
        default: k₀, one of them.
        anchor: whose time is the goal.
        p: how far the covered share of the router's weight may move, of itself.
        direction: `down` shrinks alone, `up` grows alone, `none` leaves every budget at the default.
        waits: who waits for whom. `micro_step`: ranks at each micro-batch, as sharded weights make them (FSDP). `step`:
            ranks once a step, when gradients are added up (DDP). `pipeline`: all micro-batches of a step, which follow
            each other through stages.

    Raises:
        EffpassError: a value out of its range.
    """

    budgets: tuple[int, ...]
    default: int
    anchor: Anchor = "mean"
    p: float = 0.1
    direction: Direction = "both"
    waits: Waits = "micro_step"

    def __post_init__(self) -> None:
        if not self.budgets or self.budgets[0] < 1 or sorted(set(self.budgets)) != list(self.budgets):
            raise EffpassError(f"budgets: got {list(self.budgets)}, expected numbers of keys that ascend")
        if self.default not in self.budgets:
            raise EffpassError(f"default: got {self.default}, expected one of the budgets {list(self.budgets)}")
        if not 0 <= self.p < 1:
            raise EffpassError(f"p: got {self.p}, expected a share from 0 to 1", hint="0.1 is the paper's best")
        for name, kind in (("anchor", Anchor), ("direction", Direction), ("waits", Waits)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise EffpassError(f"{name}: got {value!r}{did_you_mean(str(value), get_args(kind))}")

    @property
    def index(self) -> int:
        """Of the default among the budgets."""
        return self.budgets.index(self.default)


def budgets_around(default: int, block: int) -> tuple[int, ...]:
    """A quarter to four times as many keys, in whole blocks, the nearer to `default` the closer.

    Raises:
        EffpassError: fewer keys than the blocks that are always chosen hold.
    """
    if default <= block:
        raise EffpassError(
            f"budget: got {default} keys, and the first and the own block of {block}, which are always chosen, are two",
            hint=f"a budget of {2 * block} keys or more, or smaller blocks",
        )
    around = {max(2, -(-default * eighths // (8 * block))) for eighths in (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)}
    return tuple(block * blocks for blocks in sorted(around))


def guard(coverage: Floats, default: int, p: float) -> tuple[Ints, Ints]:
    """The smallest and the largest budget that the router's weight allows.

    Args:
        coverage: `[..., K]`, C of each budget, in [0, 1], never falling.
        default: index of k₀.
        p: see :class:`Tuning`.

    Returns:
        Two arrays of indices `[...]`: at most, and at least, `default`.
    """
    at = coverage[..., default : default + 1]
    rounding = 1e-6  # coverage is counted in float32
    lowest = (coverage >= (1 - p) * at - rounding).argmax(-1)
    wanted = coverage >= np.minimum(1.0, (1 + p) * at) - rounding
    highest = np.where(wanted.any(-1), wanted.argmax(-1), coverage.shape[-1] - 1)
    return np.minimum(lowest, default), np.maximum(highest, default)


def tune(attention: Floats, rest: Floats, lowest: Ints, highest: Ints, how: Tuning) -> Ints:
    """Budgets of every layer of every micro-batch of a step.

    Args:
        attention: `[R, M, K]`, seconds of one layer's attention with each budget.
        rest: `[R, M]`, seconds of all else.
        lowest, highest: `[R, M, L]`, what :func:`guard` allows.
        how: anchor and direction.

    Returns:
        Indices of budgets `[R, M, L]`.
    """
    layers, start = lowest.shape[-1], how.index
    chosen = np.full_like(lowest, start)
    if how.direction == "none":
        return chosen
    base = rest + layers * attention[..., start]
    goal = _goal(base, how)
    over = base > goal
    if how.direction in ("both", "down"):
        wanted = _largest_within(attention, rest, layers, goal)[..., None]
        chosen = np.where(over[..., None], np.clip(wanted, lowest, start), chosen)
    if how.direction in ("both", "up"):
        pace = _pace(micro_batch_seconds(attention, rest, chosen), base, goal, how)
        wanted = _largest_within(attention, rest, layers, pace)[..., None]
        chosen = np.where(over[..., None], chosen, np.clip(wanted, start, highest))
    return chosen


def micro_batch_seconds(attention: Floats, rest: Floats, chosen: Ints) -> Floats:
    """`[R, M]`: with the budgets that were chosen."""
    return rest + np.take_along_axis(attention, chosen, axis=-1).sum(-1)


def group_seconds(seconds: Floats, waits: Waits) -> Floats:
    """What waits for each other, side by side: `[groups, members]` of the seconds `[R, M]` of micro-batches."""
    if waits == "micro_step":
        return seconds.T
    return seconds.sum(1)[None] if waits == "step" else seconds.reshape(1, -1)


def imbalance(seconds: Floats, waits: Waits) -> tuple[float, float]:
    """Of micro-batches `[R, M]`: slowest over mean, in the mean of the groups, and the share of time that is waited."""
    groups = group_seconds(seconds, waits)
    return float((groups.max(1) / groups.mean(1)).mean()), float(1 - groups.mean(1).sum() / groups.max(1).sum())


def slowest(seconds: Floats, waits: Waits) -> float:
    """Seconds of a step `[R, M]` whose ranks wait for each other; of a pipeline, those of its fullest stage."""
    if waits == "pipeline":
        return float(seconds.sum(1).max())
    return float(group_seconds(seconds, waits).max(1).sum())


def _goal(base: Floats, how: Tuning) -> Floats:
    """`[R, M]`: the anchor of each one's group."""
    agg = _AGGREGATE[how.anchor]
    if how.waits == "micro_step":
        return np.broadcast_to(agg(base, axis=0, keepdims=True), base.shape)
    if how.waits == "pipeline":
        return np.broadcast_to(agg(base), base.shape)
    sums = base.sum(1, keepdims=True)  # each micro-batch answers for its share of its rank's time
    return base * (agg(sums) / sums)


def _pace(seconds: Floats, base: Floats, goal: Floats, how: Tuning) -> Floats:
    """`[R, M]`: how long each may take without anybody's waiting for it."""
    if how.waits == "step":
        sums = base.sum(1, keepdims=True)
        return np.maximum(goal, base * (seconds.sum(1).max() / sums))
    return np.maximum(goal, seconds.max(0, keepdims=True) if how.waits == "micro_step" else seconds.max())


def _largest_within(attention: Floats, rest: Floats, layers: int, goal: Floats) -> Ints:
    """Index of the largest budget whose micro-batch takes `goal` at most; 0 where none does."""
    fits = rest[..., None] + layers * attention <= goal[..., None] * (1 + 1e-9)
    last = attention.shape[-1] - 1 - fits[..., ::-1].argmax(-1)
    return np.where(fits.any(-1), last, 0)
