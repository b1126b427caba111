"""`effpass export`: rewrite, export, and validate the file that comes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effpass.cli.console import megabytes, print_json, progress, stdout
from effpass.cli.model import Device, Dtype, Json, Model, TrustRemoteCode, load, read_recipe

if TYPE_CHECKING:
    from rich.table import Table

    from effpass.lowering.targets.validation import Check

__all__ = ["checks_table", "export"]


def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write.", show_default=False)],
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="RECIPE",
            help="To apply: a file, or a name. Default: none; the model is exported as it is.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="inductor (.safetensors), aoti (.pt2), onnx (.onnx) or tensorrt (.engine). Default: the recipe's, "
            "else onnx.",
            show_default=False,
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(metavar="N", help="Largest batch. Default: any; for tensorrt 1.", show_default=False),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Most positions, past and new together. Default: what the model holds; for tensorrt at most 2048.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    json: Json = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Export a model as a file, rewritten by a recipe if one is given, and check the file.

    Two differences are reported, and never mixed: the file against the rewritten model (export error), and the
    rewritten model against the original (method loss). A file that is out of tolerance is not kept, and the exit code
    is 1. The graph takes and returns its cache, so that one file serves prefill and decode. With --device cuda a file
    for inductor or aoti is made for this machine's GPU. A TensorRT engine is not run: what is checked is the ONNX file
    that it is built from. What would run out of memory is refused before the model is loaded.
    """
    parsed = read_recipe(recipe)
    from effpass import api
    from effpass.core.recipe import Recipe

    parsed = parsed or Recipe.parse({"passes": []})

    chosen = target or parsed.target or "onnx"
    api.check_export(
        model,
        out,
        parsed,
        target=chosen,
        overwrite=overwrite,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    loaded = load(model, device, dtype, trust_remote_code)
    with progress() as say:
        done = api.export(
            loaded.model,
            parsed,
            out,
            target=chosen,
            max_batch=max_batch,
            max_length=max_length,
            overwrite=overwrite,
            progress=say,
        )
    if json:
        print_json(done.to_json())
        return
    console = stdout()
    for report in done.reports:
        for line in report.lines():
            console.print(line, markup=False)
    console.print(checks_table(done.checks))
    console.print(f"tolerance: {done.tolerance.why}", markup=False, soft_wrap=True)
    if not done.executed:
        console.print(f"checked by {done.checked_by}", markup=False, soft_wrap=True)
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
