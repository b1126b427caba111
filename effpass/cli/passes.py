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
    from rich.padding import Padding
    from rich.text import Text

    console = stdout()
    for row in rows:
        provider = f"from {row.distribution} {row.version}"
        if row.error is not None:
            console.print(Text.assemble((row.name, "bold"), f": not available, {provider}"))
            console.print(Padding(Text(row.error, "red"), (0, 0, 0, 4)))
            continue
        meaning = "exact" if row.exact else "approximate"
        details = f": {row.kind}, {meaning}; acts on {', '.join(row.entrances)}; {provider}"
        console.print(Text.assemble((row.name, "bold"), details))
        summary = row.summary + (" Needs an artifact." if row.needs_artifact else "")
        console.print(Padding(Text(summary), (0, 0, 0, 4)))
    console.print(
        "\nexact: the same up to rounding. model: effpass.prepare; program: torch.export and effpass export;"
        ' backend: torch.compile(model, backend="effpass").',
        style="dim",
    )
