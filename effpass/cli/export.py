"""`effpass export`: rewrite, export, and validate the file that comes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effpass.cli.console import megabytes, print_json, progress, stdout
from effpass.cli.model import Dtype, Json, Model, RecipeFile, TrustRemoteCode, load, read_recipe

if TYPE_CHECKING:
    from rich.table import Table

    from effpass.lowering.targets.validation import Check

__all__ = ["checks_table", "export"]


def export(
    model: Model,
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write.", show_default=False)],
    target: Annotated[
        str | None, typer.Option(metavar="NAME", help="onnx. Default: the recipe's target.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    json: Json = False,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Export a model, rewritten by a recipe, and check the file with onnxruntime.

    Two differences are reported, and never mixed: the file against the rewritten model (export error), and the
    rewritten model against the original (method loss). A file that is out of tolerance is not kept, and the exit code
    is 1. The graph takes and returns its cache, so that one file serves prefill and decode.
    """
    parsed = read_recipe(recipe)
    assert parsed is not None
    from effpass import api

    chosen = target or parsed.target or "onnx"
    api.check_export(out, target=chosen, overwrite=overwrite)
    loaded = load(model, "cpu", dtype, trust_remote_code)
    with progress() as say:
        done = api.export(loaded.model, parsed, out, target=chosen, overwrite=overwrite, progress=say)
    if json:
        print_json(done.to_json())
        return
    console = stdout()
    for report in done.reports:
        for line in report.lines():
            console.print(line, markup=False)
    console.print(checks_table(done.checks))
    console.print(f"saved {done.path}, {megabytes(done.size)}", markup=False)


def checks_table(checks: Sequence[Check]) -> Table:
    """One row per case: the file against the rewritten model, and the rewritten model against the original."""
    from rich import box
    from rich.table import Table

    table = Table("case", box=box.SIMPLE_HEAD, caption="largest absolute differences", caption_justify="left")
    for column in ("export error", "allowed", "error in the cache", "allowed", "method loss"):
        table.add_column(column, justify="right")
    for c in checks:
        numbers = (c.export_error, c.tolerance, c.cache_error, c.cache_tolerance, c.method_loss)
        table.add_row(c.case, *(f"{number:.1e}" for number in numbers))
    return table
