"""Shapes that a pruned model can have.

A shape is the number of kept units per set of each family (:mod:`effpass.trainers.pruning.units`), the same in every
layer. It must be accepted by the model's config, suit the tile sizes of kernels, and be divisible among the devices of
tensor parallelism. :meth:`Shapes.nearest` finds the shape that meets a budget.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from effpass.core.errors import EffpassError
from effpass.passes.weights.prunable_units import Dimensions, least_experts, write_sizes
from effpass.trainers.pruning.cost import Cost
from effpass.trainers.pruning.units import Units

__all__ = ["Shapes"]

# Maximum deviation of the cost of a shape from the requested one.
_TOLERANCE = 0.02
# Weight of the squared deviation of the cost, relative to the squared deviations of the shares of families.
_EXACTNESS = 200.0
# Number of candidates, those nearest to the wanted size, for each family except the one with the most possible sizes.
_CANDIDATES = 9


class Shapes:
    """Possible sizes of each family of units of a model.

    Args:
        config: transformers config of the model.
        units: units of the model, by family.
        multiple: divisor of the number of kept channels; all channels may be kept in any case. None: 128, or 64, where
            it divides the number of channels and is at most a sixteenth of it; otherwise the largest power of two, up
            to 64, that is at most a sixteenth (at least 8 with more than 16 channels).
        devices: number of devices that share a layer by tensor parallelism; the numbers of KV groups and of channels
            are divisible by it.

    Attributes:
        counts: number of units per set, by family.
        allowed: possible numbers of kept units per set, ascending, by family.

    Raises:
        EffpassError: no units can be removed, or the devices can't share any number of units of a family.
    """

    def __init__(self, config: Any, units: Mapping[str, Units], multiple: int | None = None, devices: int = 1) -> None:
        self._config, self._before = config, Dimensions.of(config)
        self._heads: dict[tuple[int, int], bool] = {}
        self.counts = {family: found.count for family, found in units.items() if found.size == family}
        self.allowed: dict[str, tuple[int, ...]] = {}
        for family, count in self.counts.items():
            if family.endswith("channels"):
                step = math.lcm(_multiple(count) if multiple is None else multiple, devices)
                numbers = [*range(step, count, step), *([count] if count % devices == 0 else [])]
            elif family == "experts":
                numbers = list(range(least_experts(config), count + 1))
            else:
                numbers = [n for n in range(1, count + 1) if self._accepts({family: n})]
                if family == "kv_groups":
                    numbers = [n for n in numbers if n % devices == 0]
            if not numbers:
                raise EffpassError(
                    f"no number of {family} up to {count} can be shared by {devices} devices",
                    hint=f"a smaller --tensor-parallel, or --units without {family}",
                )
            self.allowed[family] = tuple(numbers)
        if all(numbers[0] == self.counts[size] for size, numbers in self.allowed.items()):
            raise EffpassError(
                f"no units can go: {multiple or 'the default'} is the multiple, {devices} devices share a layer",
                hint="a smaller --multiple",
            )

    def most(self, size: str) -> float:
        """Return the largest share of a family that may be removed."""
        return 1 - self.allowed[size][0] / self.counts[size]

    def count(self, units: Units, sizes: Mapping[str, int]) -> int:
        """Return the number of kept units per set of a family, for given `sizes`."""
        return units.count * sizes[units.size] // self.counts[units.size]

    def share(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """Return the kept share of each family for given `sizes`."""
        return {size: number / self.counts[size] for size, number in sizes.items()}

    def nearest(
        self, cost: Cost, keep: float, wanted: Mapping[str, float], keep_of: Mapping[str, float] | None = None
    ) -> dict[str, int]:
        """Return the sizes with relative cost `keep` that are nearest to the wanted shares.

        Args:
            cost: cost of the model.
            keep: relative cost to meet.
            wanted: wanted share of the units of each family.
            keep_of: for single families, the share to use instead; the nearest possible size is taken.

        Raises:
            EffpassError: no sizes have this cost; the message has the nearest ones.
        """
        found: list[tuple[float, float, dict[str, int]]] = []
        wanted = {**wanted, **(keep_of or {})}
        by_distance = {
            size: sorted(numbers, key=lambda n: abs(n / self.counts[size] - wanted[size]))
            for size, numbers in self.allowed.items()
        }
        free = [size for size in self.allowed if size not in (keep_of or {})]
        finest = max(free, key=lambda size: len(self.allowed[size]), default=None)
        for most in (_CANDIDATES, None):
            counts = {size: most if size in free else 1 for size in self.allowed if size != finest} | {finest: None}
            for numbers in itertools.product(*(by_distance[size][: counts[size]] for size in self.allowed)):
                sizes = dict(zip(self.allowed, numbers, strict=True))
                if sizes != self.counts and self._accepts(sizes):  # something is removed
                    shares = self.share(sizes)
                    far = sum((shares[size] - wanted[size]) ** 2 for size in free)
                    found.append((abs(cost.share(shares) - keep), far, sizes))
            near = [entry for entry in found if entry[0] <= _TOLERANCE]
            if near:
                return min(near, key=lambda entry: entry[1] + _EXACTNESS * entry[0] ** 2)[2]
        if not found:
            told = ", ".join(f"{size} {by_distance[size][0]} of {count}" for size, count in self.counts.items())
            raise EffpassError(
                f"no shape keeps {keep:.3g} of the {cost.unit}: what is asked for of single kinds leaves {told}",
                hint="another --keep-of, or a smaller --multiple",
            )
        _, _, sizes = min(found, key=lambda entry: entry[:2])
        share = cost.share(self.share(sizes))
        told = ", ".join(f"{size} {number} of {self.counts[size]}" for size, number in sizes.items())
        raise EffpassError(
            f"no shape keeps {keep:.3g} of the {cost.unit}: the nearest keeps {share:.3f} ({told})",
            hint=f"--keep {share:.3f}, or another --multiple",
        )

    def _accepts(self, sizes: Mapping[str, int]) -> bool:
        """Whether the config accepts these numbers of KV groups and of query heads per group."""
        before = self._before
        heads = sizes.get("kv_groups", before.num_key_value_heads), sizes.get("query_heads", before.heads_per_group)
        if heads not in self._heads:
            after = replace(before, num_attention_heads=heads[0] * heads[1], num_key_value_heads=heads[0])
            smaller = copy.deepcopy(self._config)
            try:
                write_sizes(smaller, after)
                type(smaller).from_dict(smaller.to_dict())
            except Exception:  # a config class may raise any exception for sizes that it rejects
                self._heads[heads] = False
            else:
                self._heads[heads] = True
        return self._heads[heads]


def _multiple(count: int) -> int:
    for step in (128, 64):
        if count >= 16 * step and count % step == 0:
            return step
    finest = 8 if count > 16 else 1  # 8 numbers of 16 bits are 16 bytes
    return max(finest, min(64, 2 ** int(math.log2(max(1, count // 16)))))
