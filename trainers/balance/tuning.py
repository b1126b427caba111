"""Dynamic sparsity tuning: the choice of budgets with which the ranks of a step finish together.

    A         = agg over the group of t_i(k₀)                     agg: mean, min or max; the anchor
    shrinking   t_i(k₀) > A:  k = max{k : t_i(k) ≤ A},   at least  min{k : C_iℓ(k) ≥ (1 − p) C_iℓ(k₀)}
    A'        = max(A, slowest of the group after shrinking)
    growing     t_i(k₀) ≤ A:  k = max{k : t_i(k) ≤ A'},  at most   min{k : C_iℓ(k) ≥ min(1, (1 + p) C_iℓ(k₀))}

t_i(k) is the time of micro-batch i with budget k, k₀ the default budget, and ℓ a layer. A group consists of the
micro-batches that wait for each other. C(k), the coverage, is the share of the router's weight on the blocks of the k
best keys, averaged over queries; the bounds that it sets are called the guard. The algorithm is that of SparseBalance
(https://arxiv.org/abs/2604.13847), with two cases added that the paper leaves open. If no budget is fast enough, the
smallest one that the guard allows is chosen, and the micro-batch remains slower than the anchor. Since the others then
wait for it, they may grow up to its time instead of the anchor's, which does not lengthen the step.

The tuner (:mod:`.tuner`) and the simulator (:mod:`.simulator`) call these functions, which are pure. Shapes: R ranks, M
micro-batches per rank and step, L layers, K available budgets.
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
    """Rules by which budgets may change.

    Attributes:
        budgets: available budgets in keys, ascending.
        default: default budget k₀, one of `budgets`.
        anchor: statistic of a group's times that is the target time.
        p: largest relative change of the coverage.
        direction: `both`, `down` to only shrink budgets, `up` to only grow them, or `none` to keep the default.
        waits: which micro-batches wait for each other. `micro_step`: those of all ranks at each micro-step, as with
            sharded weights (FSDP). `step`: the ranks wait once per step, when gradients are reduced (DDP). `pipeline`:
            all micro-batches of a step, which pass through the stages one after the other.

    Raises:
        EffpassError: if a value is out of range.
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
        """Index of the default among the budgets."""
        return self.budgets.index(self.default)


def budgets_around(default: int, block: int) -> tuple[int, ...]:
    """Return budgets from a quarter to four times `default`, in whole blocks, with smaller distances near `default`.

    Args:
        default: default budget in keys.
        block: number of keys per block.

    Raises:
        EffpassError: if `default` is not larger than one block; two blocks are always chosen.
    """
    if default <= block:
        raise EffpassError(
            f"budget: got {default} keys, and the first and the own block of {block}, which are always chosen, are two",
            hint=f"a budget of {2 * block} keys or more, or smaller blocks",
        )
    around = {max(2, -(-default * eighths // (8 * block))) for eighths in (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)}
    return tuple(block * blocks for blocks in sorted(around))


def guard(coverage: Floats, default: int, p: float) -> tuple[Ints, Ints]:
    """Return the smallest and the largest budget that the coverage allows.

    Args:
        coverage: coverage C of each budget `[..., K]`, in [0, 1] and non-decreasing.
        default: index of k₀.
        p: see :class:`Tuning`.

    Returns:
        Two arrays of indices `[...]`, which are at most and at least `default`.
    """
    at = coverage[..., default : default + 1]
    rounding = 1e-6  # tolerance, since coverage is measured in float32
    lowest = (coverage >= (1 - p) * at - rounding).argmax(-1)
    wanted = coverage >= np.minimum(1.0, (1 + p) * at) - rounding
    highest = np.where(wanted.any(-1), wanted.argmax(-1), coverage.shape[-1] - 1)
    return np.minimum(lowest, default), np.maximum(highest, default)


def tune(attention: Floats, rest: Floats, lowest: Ints, highest: Ints, how: Tuning) -> Ints:
    """Choose the budgets of all layers of all micro-batches in a step.

    Args:
        attention: `[R, M, K]`, seconds of the attention of one layer with each budget.
        rest: `[R, M]`, seconds of everything else.
        lowest, highest: `[R, M, L]`, indices of the bounds from :func:`guard`.
        how: rules of the tuning.

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
    """Return the seconds of each micro-batch `[R, M]` with the chosen budgets."""
    return rest + np.take_along_axis(attention, chosen, axis=-1).sum(-1)


def group_seconds(seconds: Floats, waits: Waits) -> Floats:
    """Arrange the seconds of micro-batches `[R, M]` as `[groups, members]`; members of a group wait for each other."""
    if waits == "micro_step":
        return seconds.T
    return seconds.sum(1)[None] if waits == "step" else seconds.reshape(1, -1)


def imbalance(seconds: Floats, waits: Waits) -> tuple[float, float]:
    """Return two measures of the waiting between micro-batches `[R, M]`.

    Returns:
        Ratio of slowest to mean time, averaged over groups; and share of the time that is spent waiting.
    """
    groups = group_seconds(seconds, waits)
    return float((groups.max(1) / groups.mean(1)).mean()), float(1 - groups.mean(1).sum() / groups.max(1).sum())


def slowest(seconds: Floats, waits: Waits) -> float:
    """Return the seconds of a step from those of micro-batches `[R, M]`; in a pipeline, the largest sum of a rank."""
    if waits == "pipeline":
        return float(seconds.sum(1).max())
    return float(group_seconds(seconds, waits).max(1).sum())


def _goal(base: Floats, how: Tuning) -> Floats:
    """Return the target time of each micro-batch `[R, M]`, from the anchor of its group."""
    agg = _AGGREGATE[how.anchor]
    if how.waits == "micro_step":
        return np.broadcast_to(agg(base, axis=0, keepdims=True), base.shape)
    if how.waits == "pipeline":
        return np.broadcast_to(agg(base), base.shape)
    sums = base.sum(1, keepdims=True)  # a rank's target time is divided in proportion to the micro-batches' own times
    return base * (agg(sums) / sums)


def _pace(seconds: Floats, base: Floats, goal: Floats, how: Tuning) -> Floats:
    """Return the time that each micro-batch `[R, M]` may take without making the others wait."""
    if how.waits == "step":
        sums = base.sum(1, keepdims=True)
        return np.maximum(goal, base * (seconds.sum(1).max() / sums))
    return np.maximum(goal, seconds.max(0, keepdims=True) if how.waits == "micro_step" else seconds.max())


def _largest_within(attention: Floats, rest: Floats, layers: int, goal: Floats) -> Ints:
    """Return the index of the largest budget with which a micro-batch takes at most `goal`; 0 if there is none."""
    fits = rest[..., None] + layers * attention <= goal[..., None] * (1 + 1e-9)
    last = attention.shape[-1] - 1 - fits[..., ::-1].argmax(-1)
    return np.where(fits.any(-1), last, 0)
