"""Legal recipes of a search: the combinations of choices that the pass manager accepts, each in one order."""

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
    """A recipe of a search, identified by its choices in order."""

    choices: tuple[Choice, ...] = ()

    @property
    def key(self) -> str:
        """Name of the recipe in messages and in the log: the labels of its choices in order."""
        return " + ".join(choice.label for choice in self.choices) or "dense"

    @property
    def recipe(self) -> Recipe:
        return Recipe.parse({"passes": self.items(self.choices)})

    @property
    def weights(self) -> Candidate:
        """The candidate that consists of the weights passes of this one alone."""
        return Candidate(tuple(choice for choice in self.choices if load(choice.name).kind == "weights"))

    def holds(self, other: Candidate) -> bool:
        """Whether this candidate contains all choices of `other`."""
        return set(other.choices) <= set(self.choices)

    @staticmethod
    def items(choices: Iterable[Choice]) -> list[dict[str, Any]]:
        return [{choice.name: dict(choice.options)} for choice in choices]


DENSE = Candidate()


def legal_recipes(choices: Sequence[Choice], most: int) -> list[Candidate]:
    """All legal recipes of up to `most` passes, the empty one first.

    A set of choices gives at most one recipe, since two legal orders have the same effect: when both are legal, no pass
    depends on what another one changed.

    Args:
        choices: choices to combine; a recipe contains at most one choice of a pass.
        most: maximum number of passes in a recipe.
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
