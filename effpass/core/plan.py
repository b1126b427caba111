"""Reads recipes, and builds the passes that they name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effpass.core import registry
from effpass.core.manager import PassManager, Planned
from effpass.core.options import has_defaults
from effpass.core.recipe import Recipe

__all__ = ["default_passes", "plan", "read_recipe"]


def read_recipe(recipe: Recipe | str | Path | Mapping[str, Any] | None) -> Recipe | None:
    """Read a recipe from a path or a mapping; a :class:`Recipe` and None are returned unchanged."""
    if recipe is None or isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return Recipe.parse(dict(recipe), base=Path.cwd(), source="recipe")
    return Recipe.load(Path(recipe))


def plan(recipe: Recipe | str | Path | Mapping[str, Any] | None) -> list[Planned]:
    """Build the passes of a recipe; None stands for every exact pass on weights and graphs that needs no artifact."""
    parsed = read_recipe(recipe)
    if parsed is not None:
        return PassManager.from_recipe(parsed).planned
    return default_passes()


def default_passes() -> list[Planned]:
    """Build every exact pass on weights and graphs that needs neither an artifact nor an option.

    They are in the order of their names, but weights passes precede graph passes, because they look for the matrix
    products of the weights that they change, which a graph pass may have fused with other operators. Passes that
    rewrite the results of others are last.
    """
    infos = sorted(registry.describe(), key=lambda info: info.kind != "weights")
    wanted = [i for i in infos if i.error is None and i.exact and not i.needs_artifact and i.kind != "runtime"]
    classes = sorted((registry.load(i.name) for i in wanted), key=lambda found: bool(found.follows))
    return [Planned(found()) for found in classes if has_defaults(found.Options)]
