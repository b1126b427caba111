"""Reads recipes, and builds the passes that they name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effpass.core import registry
from effpass.core.manager import PassManager, Planned
from effpass.core.recipe import Recipe

__all__ = ["plan", "read_recipe"]


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
    return [
        Planned(registry.load(info.name)())
        for info in registry.describe()
        if info.error is None and info.exact and not info.needs_artifact and info.kind != "runtime"
    ]
