"""The sizes that a pruned model can have: what its config accepts, what kernels like, and what devices can share."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from typing import Any

from effpass.core.errors import EffpassError
from effpass.passes.weights.prunable_units import Dimensions, least_experts, write_sizes
from effpass.trainers.pruning.cost import Cost
from effpass.trainers.pruning.units import Units

__all__ = ["Shapes"]

# How far a shape's cost may be from the one that was asked for.
_TOLERANCE = 0.02
# What a deviation of the cost weighs, squared, against deviations of the families' shares.
_EXACTNESS = 200.0
# Candidates of a family but the finest, the nearest to what is wanted.
_CANDIDATES = 9


class Shapes:
    """
    Attributes:
        allowed: numbers of units of a set that may stay, ascending, all of them last; by size.

    Args:
        config: of the model.
        units: of the model.
        multiple: kept channels are a multiple of it; None for 128 where there are 16 times as many channels, else for
            64, and of a smaller power of two for narrower layers.
        devices: that share a layer by tensor parallelism: heads and channels are divisible by it.

    Raises:
        EffpassError: nothing is left that may go.
    """

    def __init__(self, config: Any, units: Mapping[str, Units], multiple: int | None = None, devices: int = 1) -> None:
        self.allowed: dict[str, tuple[int, ...]] = {}
        self._counts = {u.family: u.count for u in units.values()}
        before = Dimensions.of(config)
        for family, found in units.items():
            if found.size != family:
                continue
            if family.endswith("channels"):
                step = math.lcm(_multiple(found.count) if multiple is None else multiple, devices)
                numbers = list(range(step, found.count, step))
            elif family == "experts":
                numbers = list(range(least_experts(config), found.count))
            else:
                numbers = [n for n in range(1, found.count) if _accepts(config, before, family, n, devices)]
            self.allowed[family] = (*numbers, found.count)
        if all(len(numbers) == 1 for numbers in self.allowed.values()):
            raise EffpassError(
                f"no units can go: {multiple or 'the default'} is the multiple, {devices} devices share a layer",
                hint="a smaller --multiple",
            )

    def most(self, size: str) -> float:
        """The largest share of a family that may go."""
        return 1 - self.allowed[size][0] / self.allowed[size][-1]

    def count(self, units: Units, sizes: Mapping[str, int]) -> int:
        """Kept units of a set, where `sizes` are chosen."""
        return units.count * sizes[units.size] // self.allowed[units.size][-1]

    def share(self, sizes: Mapping[str, int]) -> dict[str, float]:
        return {size: number / self.allowed[size][-1] for size, number in sizes.items()}

    def nearest(
        self, cost: Cost, keep: float, wanted: Mapping[str, float], keep_of: Mapping[str, float] | None = None
    ) -> dict[str, int]:
        """The sizes that cost `keep`, as near as can be to the wanted shares.

        Args:
            wanted: share of each family's units.
            keep_of: shares that are asked for of single families: the nearest possible ones.

        Raises:
            EffpassError: no sizes cost that; says the nearest.
        """
        found: list[tuple[float, float, dict[str, int]]] = []
        fixed = {size: min(self.allowed[size], key=lambda n: abs(n / self.allowed[size][-1] - s))
                 for size, s in (keep_of or {}).items()}  # fmt: skip
        free = [size for size in self.allowed if size not in fixed]
        finest = max(free, key=lambda size: len(self.allowed[size]), default=None)
        for candidates in (_CANDIDATES, None):
            others = [
                sorted(self.allowed[size], key=lambda n: abs(n / self.allowed[size][-1] - wanted[size]))[:candidates]
                for size in free if size != finest
            ]  # fmt: skip
            for numbers in itertools.product(*others):
                sizes = {**fixed, **dict(zip((s for s in free if s != finest), numbers, strict=True))}
                for number in self.allowed[finest] if finest is not None else (0,):
                    every = sizes if finest is None else {**sizes, finest: number}
                    shares = self.share(every)
                    far = sum((shares[size] - wanted[size]) ** 2 for size in free)
                    found.append((abs(cost.share(shares) - keep), far, every))
            near = [entry for entry in found if entry[0] <= _TOLERANCE]
            if near:
                best = min(near, key=lambda entry: entry[1] + _EXACTNESS * entry[0] ** 2)
                return {size: best[2][size] for size in self.allowed}
        smaller = [entry for entry in found if cost.share(self.share(entry[2])) < 1]
        _, _, sizes = min(smaller, key=lambda entry: entry[:2])
        share = cost.share(self.share(sizes))
        told = ", ".join(f"{size} {number} of {self.allowed[size][-1]}" for size, number in sizes.items())
        raise EffpassError(
            f"no shape keeps {keep:.3g} of the {cost.unit}: the nearest keeps {share:.3f} ({told})",
            hint=f"--keep {share:.3f}, or another --multiple",
        )


def _multiple(count: int) -> int:
    for step in (128, 64):
        if count >= 16 * step and count % step == 0:
            return step
    return max(8 if count > 16 else 1, 2 ** int(math.log2(max(1, count // 16))))  # 16 bytes of 16-bit numbers


def _accepts(config: Any, before: Dimensions, family: str, number: int, devices: int) -> bool:
    """Whether a config with so many groups, or query heads of each, can be made."""
    groups = number if family == "kv_groups" else before.num_key_value_heads
    own = number if family == "query_heads" else before.heads_per_group
    if groups % devices:
        return False
    smaller = copy.deepcopy(config)
    after = type(before)(**{**vars(before), "num_attention_heads": groups * own, "num_key_value_heads": groups})
    try:
        write_sizes(smaller, after)
        type(smaller).from_dict(smaller.to_dict())
    except Exception:  # whatever a config class does not accept
        return False
    return True
