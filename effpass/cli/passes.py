"""`effpass passes`: every pass there is, who provides it, and which can't be loaded."""

from __future__ import annotations

from dataclasses import asdict

from effpass.cli.console import print_json, stdout
from effpass.cli.model import Json

__all__ = ["passes"]


def passes(json: Json = False) -> None:
    """List the passes: what they do, whether they are exact, and where they can act."""
    from effpass.core.registry import describe

    rows = describe()
    if json:
        print_json([asdict(row) for row in rows])
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("pass", "kind", "meaning", "acts on", "provided by", "what it does"):
        table.add_column(column, overflow="fold", no_wrap=column != "what it does")
    for row in rows:
        if row.error is None:
            meaning = "exact" if row.exact else "approximate"
            summary = row.summary + (" Needs an artifact." if row.needs_artifact else "")
            provider = f"{row.distribution} {row.version}"
            table.add_row(row.name, row.kind, meaning, ", ".join(row.entrances), provider, Text(summary))
    console = stdout()
    console.print(table)
    console.print(
        "exact: the same up to rounding. model: effpass.prepare; program: torch.export and effpass export;"
        ' backend: torch.compile(model, backend="effpass").',
        style="dim",
    )
    for row in rows:
        if row.error is not None:
            console.print(Text(f"not available: {row.error}", "red"))
