"""`effpass inspect --redundancy FILE`: what sparse verification of token trees would rest on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from effpass.cli.console import step
from effpass.cli.text import ids_of, most_tokens, pieces

if TYPE_CHECKING:
    from rich.console import Console

    from effpass.core.recipe import Recipe
    from effpass.runtime.speculative.redundancy import Redundancy

__all__ = ["look", "show"]

_TOKENS, _SAMPLES = 4096, 4


def look(loaded: Any, recipe: Recipe | None, text: str, data: Path) -> Redundancy:
    """Measure over `text`, from file `data`, with the shares of the recipe's `sparse_verification`.

    Raises:
        EffpassError: the text is too short.
    """
    from effpass.passes.runtime.sparse_verification import SparseVerificationOptions
    from effpass.runtime.speculative.redundancy import Budgets, measure

    given = [s.options for s in recipe.steps if s.name == "sparse_verification"] if recipe is not None else []
    options = given[0] if given else SparseVerificationOptions()
    defaults = Budgets()
    budgets = Budgets(
        options.attention or defaults.attention, options.block, options.channels or defaults.channels,
        options.experts or defaults.experts,
    )  # fmt: skip
    ids = ids_of(text, loaded, str(data))
    with step(f"looking at {data.name}"):
        samples = pieces(ids, most_tokens(_TOKENS, loaded.model), _SAMPLES, least=budgets.nodes + 1)
        return measure(loaded.model, samples, budgets)


def show(console: Console, found: Redundancy) -> None:
    """A table by layer, and how alike neighbors are."""
    from rich import box
    from rich.table import Table

    of = found.budgets
    console.print(f"what {of.nodes} consecutive tokens read alike, over {len(found.tokens)} samples of text")
    if found.blocks:
        table = Table("layer", box=box.SIMPLE_HEAD)
        table.add_column(f"the first's blocks ({of.attention:.0%}), chosen by others too", justify="right")
        table.add_column("alike to the layer before", justify="right")
        for place, layer in enumerate(found.layers):
            share = found.blocks.get(layer)
            alike = f"{float(found.similar[place, place - 1]):.0%}" if place else ""
            table.add_row(str(layer), "" if share is None else f"{share:.0%}", alike)
        console.print(table)
    for what, held, share, rows in (
        ("channels", "of squared gates", of.channels, found.channels),
        ("experts", "of weights", of.experts, found.experts),
    ):
        if rows:
            table = Table(f"{what} ({share:.0%})", box=box.SIMPLE_HEAD)
            table.add_column("union of the tokens' own", justify="right")
            table.add_column(f"shared ones hold, {held}", justify="right")
            for name, (union, part) in rows.items():
                table.add_row(name, f"{union:.0%}", f"{part:.0%}")
            console.print(table)
