"""`effpass recipe check`: validate a recipe without a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from effpass.cli.console import print_json, stdout
from effpass.cli.model import Json
from effpass.core.errors import EffpassError, RecipeError

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Work with recipes.")


@app.callback()
def _group() -> None:
    pass


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="RECIPE", help="A file, YAML, or a name.", show_default=False)],
    json: Json = False,
) -> None:
    """Say whether a recipe is valid: its keys, passes, options, and the files it names."""
    from effpass.core.manager import PassManager
    from effpass.core.recipe import Recipe
    from effpass.core.registry import load

    try:
        recipe = Recipe.load(file)
        PassManager.from_recipe(recipe)
        missing = [
            fault for i, step in enumerate(recipe.steps) for fault in _missing(step.options, f"passes[{i}].{step.name}")
        ]
        if missing:
            raise RecipeError(
                f"{file}: " + f"\n  {file}: ".join(missing), hint="paths are relative to the recipe's folder"
            )
    except EffpassError as error:
        if not json:
            raise
        print_json({"valid": False, "file": str(file), "error": error.message, "hint": error.hint})
        raise typer.Exit(1) from None
    rows = []
    for step in recipe.steps:
        cls = load(step.name)
        rows.append(
            {"pass": step.name, "kind": cls.kind, "exact": cls.exact, "require": step.require, "verify": step.verify}
        )
    if json:
        print_json({"valid": True, "file": str(file), "target": recipe.target, "passes": rows})
        return
    console = stdout()
    count = len(rows)
    console.print(f"{file}: valid, {count} pass{'' if count == 1 else 'es'}", markup=False)
    for row in rows:
        words = [row["kind"], "exact" if row["exact"] else "approximate"]
        words += [word for word in ("require", "verify") if row[word]]
        console.print(f"  {row['pass']}: {', '.join(map(str, words))}", markup=False)
    if recipe.target:
        console.print(f"  target: {recipe.target}", markup=False)


def _missing(options: Any, where: str) -> Iterator[str]:
    """Options that are paths of nothing."""
    if isinstance(options, Path):
        if not options.exists():
            yield f"{where}: no such file or folder: {options}"
    elif isinstance(options, (list, tuple)):
        for i, value in enumerate(options):
            yield from _missing(value, f"{where}[{i}]")
    elif isinstance(options, dict):
        for key, value in options.items():
            yield from _missing(value, f"{where}.{key}")
    elif dataclasses.is_dataclass(options):
        for field in dataclasses.fields(options):
            yield from _missing(getattr(options, field.name), f"{where}.{field.name}")
