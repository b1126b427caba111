"""Legal recipes: choices that stand together, in an order that the manager takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any

from effpass.core.errors import EffpassError
from effpass.core.manager import PassManager
from effpass.core.recipe import Recipe
from effpass.core.registry import load
from effpass.search.choices import Choice

__all__ = ["DENSE", "Candidate", "legal_recipes"]

_KINDS = ("weights", "runtime", "graph")


@dataclass(frozen=True)
class Candidate:
    """A recipe of a search; it is known by its choices."""

    choices: tuple[Choice, ...] = ()

    @property
    def key(self) -> str:
        """What people see, and the log says: the labels in their order."""
        return " + ".join(choice.label for choice in self.choices) or "dense"

    @property
    def recipe(self) -> Recipe:
        return Recipe.parse({"passes": self.items(self.choices)})

    @property
    def weights(self) -> Candidate:
        """Its passes that change weights, alone."""
        return Candidate(tuple(choice for choice in self.choices if load(choice.name).kind == "weights"))

    def holds(self, other: Candidate) -> bool:
        """Whether all choices of `other` are among its own."""
        return set(other.choices) <= set(self.choices)

    @staticmethod
    def items(choices: Iterable[Choice]) -> list[dict[str, Any]]:
        return [{choice.name: dict(choice.options)} for choice in choices]


DENSE = Candidate()


def legal_recipes(choices: Sequence[Choice], most: int) -> list[Candidate]:
    """Every legal recipe of up to `most` passes, the empty one first.

    One for each set of choices: orders that are both legal do the same, since then neither pass looks at what the other
    changed.
    """
    by_kind = sorted(choices, key=lambda choice: _KINDS.index(load(choice.name).kind))
    found = [DENSE]
    for count in range(1, most + 1):
        for members in combinations(by_kind, count):
            if len({choice.name for choice in members}) == count:
                legal = next((order for order in permutations(members) if _is_legal(order)), None)
                if legal is not None:
                    found.append(Candidate(legal))
    return found


def _is_legal(choices: Sequence[Choice]) -> bool:
    try:
        PassManager.from_recipe(Candidate(tuple(choices)).recipe)
    except EffpassError:
        return False
    return True
