"""`effpass inspect`: what a recipe would do to a model, without doing it."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effpass.cli.console import megabytes, print_json, stdout, step
from effpass.cli.model import Device, Dtype, Json, Model, RecipeFile, TrustRemoteCode, load, read_recipe

if TYPE_CHECKING:
    from rich.console import Console

    from effpass.api import Inspection
    from effpass.core.report import PassReport, Refusal

__all__ = ["inspect", "ops_table"]


def inspect(
    model: Model,
    recipe: RecipeFile,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every candidate that was left alone.")] = False,
    json: Json = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show what a recipe would rewrite, what it would leave alone and why, and what that changes.

    The model is traced on 2 x 16 tokens and not changed. Exit code 1 when a required pass would rewrite nothing.
    """
    parsed = read_recipe(recipe)
    loaded = load(model, device, dtype, trust_remote_code)
    from effpass import api

    with step("tracing one forward"):
        found = api.inspect(loaded.model, parsed)
    if json:
        print_json({"model": model, "recipe": str(recipe), **found.to_json()})
    else:
        _show(stdout(), found, verbose)
    if found.unmet:
        raise typer.Exit(1)


def _show(console: Console, found: Inspection, verbose: bool) -> None:
    for entry in merged_reports(found):
        _show_pass(console, entry, verbose)
    for entry in found.prepared:
        console.print(f"[bold]{entry.name}[/bold] acts on the model itself, through effpass.prepare; not traced here")
    for report in found.reports:
        if report.unrewritten:
            console.print(f"one graph of {found.graphs} goes on as it is: {report.unrewritten}", markup=False)
    for name in found.unmet:
        console.print(f"[red]{name} is required and would rewrite nothing[/red]")
    changed = {
        op for op in found.ops_after | found.ops_before if found.ops_after.get(op, 0) != found.ops_before.get(op, 0)
    }
    if changed:
        console.print(ops_table({op: (found.ops_before.get(op, 0), found.ops_after.get(op, 0)) for op in changed}))
    total = sum(found.ops_before.values()), sum(found.ops_after.values())
    console.print(f"operators: {total[0]} → {total[1]}, in {found.graphs} graph{'s' * (found.graphs != 1)}")
    derived = f"{megabytes(found.derived_bytes)} derived" if found.derived_bytes else "nothing derived"
    note = " (effpass.prepare and exports hold one copy)" if found.derived_bytes else ""
    console.print(f"memory under torch.compile: {megabytes(found.weight_bytes)} original + {derived}{note}")


def merged_reports(found: Inspection) -> list[PassReport]:
    """One entry per pass, summed over the graphs."""
    from effpass.core.report import PassReport

    total: dict[str, PassReport] = {}
    for report in found.reports:
        for entry in report.passes:
            into = total.setdefault(entry.name, PassReport(entry.name, entry.exact, flops=0, weight_bytes=0))
            into.hits += entry.hits
            into.refusals += entry.refusals
            into.flops = (into.flops or 0) + (entry.flops or 0)
            into.weight_bytes = (into.weight_bytes or 0) + (entry.weight_bytes or 0)
    return list(total.values())


def _show_pass(console: Console, entry: PassReport, verbose: bool) -> None:
    from rich.text import Text

    kind = "exact" if entry.exact else "approximate"
    line = Text.assemble((entry.name, "bold"), f" ({kind}): ")
    line.append(f"{entry.hits} rewritten", "green" if entry.hits else "yellow")
    if entry.flops:
        line.append(f"; {entry.flops:+,} FLOPs a forward")
    if entry.weight_bytes:
        line.append(f"; {'+' * (entry.weight_bytes > 0)}{megabytes(entry.weight_bytes)} of weights read a forward")
    if not entry.hits and not entry.refusals:
        line.append("; the model has nothing that it looks for")
    console.print(line)
    groups: dict[tuple[str, str], list[Refusal]] = defaultdict(list)
    for refusal in entry.refusals:
        groups[(refusal.reason, refusal.hint)].append(refusal)
    for (reason, hint), members in groups.items():
        where = members[0].node + (f" and {len(members) - 1} more" if len(members) > 1 else "")
        console.print(Text(f"  left alone: {where}: {reason}" + (f" → {hint}" if hint else "")))
        if verbose:
            for member in members:
                console.print(Text(f"    {member.node}", "dim"))


def ops_table(counts: dict[str, tuple[int, int]]) -> Any:
    """Operators whose number changes, largest change first."""
    from rich import box
    from rich.table import Table

    table = Table("operator", box=box.SIMPLE_HEAD)
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    for op, (before, after) in sorted(counts.items(), key=lambda item: (-abs(item[1][1] - item[1][0]), item[0])):
        table.add_row(op, str(before), str(after), f"{after - before:+d}")
    return table
