"""`effpass validate`: check an exported file, later and without its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effpass.cli.console import print_json, progress, stdout
from effpass.cli.model import Json

__all__ = ["validate"]


def validate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `effpass export` wrote.", show_default=False)],
    allow_native: Annotated[
        bool, typer.Option("--allow-native", help="Run native code from the file. Only if you trust its source.")
    ] = False,
    json: Json = False,
) -> None:
    """Check an exported file: unaltered to the bit, and right on this machine.

    The file keeps what the rewritten model answered when it was exported, and is run again on the same inputs. The exit
    code is 1 when it was altered or cut, or is out of tolerance. A TensorRT engine is read, not run.
    """
    from effpass import api

    with progress() as say:
        found = api.validate(file, allow_native=allow_native, progress=say)
    if json:
        print_json(found.to_json())
    else:
        from rich import box
        from rich.table import Table

        console = stdout()
        line = f"{found.path}: {found.target}, written by effpass {found.version}, unaltered"
        console.print(line, markup=False, soft_wrap=True)
        if found.executed:
            table = Table("case", box=box.SIMPLE_HEAD)
            for column in ("error", "allowed", ""):
                table.add_column(column, justify="right")
            for c in found.cases:
                table.add_row(c.case, f"{c.error:.1e}", f"{c.tolerance:.1e}", "ok" if c.ok else "out of tolerance")
            console.print(table)
        else:
            console.print(
                "not run: effpass runs no engines; what was measured at its export is in the record beside it"
            )
    if not found.ok:
        raise typer.Exit(1)
