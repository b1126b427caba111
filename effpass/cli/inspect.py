"""`effpass inspect`: what a recipe would do to a model, without doing it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effpass.cli import units
from effpass.cli.console import megabytes, print_json, stdout, step
from effpass.cli.model import Device, Dtype, Json, Model, RecipeFile, TrustRemoteCode, load, read_recipe
from effpass.cli.text import read_text

if TYPE_CHECKING:
    from rich.console import Console

    from effpass.api import Inspection
    from effpass.core.report import PassReport, Refusal, Report

__all__ = ["inspect", "ops_table"]


def inspect(
    model: Model,
    recipe: RecipeFile,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as one HTML file.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the HTML file where it exists.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Sequences, of the prefill and of the decode step.")] = 1,
    tokens: Annotated[int, typer.Option(min=0, help="Length of the predicted prompt; 0 leaves prefill out.")] = 512,
    cache_length: Annotated[int, typer.Option(min=1, help="Positions of the cache that a decode step reads.")] = 1024,
    predict_for: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Predict for a known device: h100. Default: measure this one.", show_default=False
        ),
    ] = None,
    redundancy: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Run this text, and say what tokens of a tree would read alike.", show_default=False
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every candidate that was left alone.")] = False,
    json: Json = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show what a recipe would rewrite, what it would leave alone and why, and what that gains.

    Prefill and one decode step are traced; the model is not changed. Times are predicted by the cost model, not
    measured. Exit code 1 when a required pass would rewrite nothing.
    """
    parsed = read_recipe(recipe)
    if html is not None:
        from effpass.cli.html_report import check_writable

        check_writable(html, overwrite=overwrite)
    if predict_for is not None:
        from effpass.core.roofline import known

        known(predict_for)  # an unknown name is refused before anything is loaded
    text = None if redundancy is None else read_text(redundancy, "--redundancy")
    loaded = load(model, device, dtype, trust_remote_code)
    from effpass import api

    with step("tracing prefill and one decode step"):
        found = api.inspect(
            loaded.model, parsed, batch=batch, tokens=tokens, cache_length=cache_length, predict_for=predict_for
        )
    report = {"model": model, "recipe": str(recipe), **found.to_json()}
    alike = None
    if redundancy is not None and text is not None:
        from effpass.cli.redundancy import look

        alike = look(loaded, parsed, text, redundancy)
        report["redundancy"] = alike.to_json()
    if html is not None:
        from effpass.cli.html_report import write_report

        write_report(report, html)
    if json:
        print_json(report)
    else:
        _show(stdout(), found, verbose)
        if alike is not None:
            from effpass.cli.redundancy import show

            show(stdout(), alike)
        if html is not None:
            stdout().print(f"report: {html}", markup=False, soft_wrap=True)
    if found.unmet:
        raise typer.Exit(1)


def _show(console: Console, found: Inspection, verbose: bool) -> None:
    in_a_step = {entry.name: entry.hits for entry in _merged(found.decode_reports)}
    for entry in _merged(found.reports):
        _show_pass(console, entry, in_a_step.get(entry.name, entry.hits), verbose)
    for entry in found.prepared:
        console.print(f"[bold]{entry.name}[/bold] acts on the model itself, through effpass.prepare; not traced here")
        if entry.note:
            console.print(f"  {entry.note}", markup=False)
    for report in found.reports:
        if report.unrewritten:
            console.print(f"one graph of {found.graphs} goes on as it is: {report.unrewritten}", markup=False)
    for line in found.changed:
        console.print(line, markup=False)
    for name in found.unmet:
        console.print(f"[red]{name} is required and would rewrite nothing[/red]")
    changed = {
        op for op in found.ops_after | found.ops_before if found.ops_after.get(op, 0) != found.ops_before.get(op, 0)
    }
    if changed:
        console.print(ops_table({op: (found.ops_before.get(op, 0), found.ops_after.get(op, 0)) for op in changed}))
    total = sum(found.ops_before.values()), sum(found.ops_after.values())
    console.print(f"operators: {total[0]} → {total[1]}, in {found.graphs} graph{'s' * (found.graphs != 1)}")
    _show_costs(console, found)
    derived = f"{megabytes(found.derived_bytes)} derived" if found.derived_bytes else "nothing derived"
    note = " (effpass.prepare and exports hold one copy)" if found.derived_bytes else ""
    console.print(f"memory under torch.compile: {megabytes(found.weight_bytes)} original + {derived}{note}")
    memory = found.memory
    if memory is not None and memory.cache is not None:
        console.print(
            f"key-value cache: {megabytes(memory.cache)} for batch {memory.batch}, {memory.cache_length:,} positions,"
            f" {units.bytes_(memory.cache_per_token or 0)} for each further one"
        )


def _show_costs(console: Console, found: Inspection) -> None:
    """Each workload's predicted time and what it stands on, as loaded and after the passes."""
    from rich import box
    from rich.table import Table

    for work in found.workloads:
        for reason in work.missing:
            console.print(f"{work.name}: not counted: {reason}", markup=False)
        if work.uncounted:
            console.print(f"{work.name}: FLOPs unknown of: {', '.join(work.uncounted)}", markup=False)
        if not work.stages:
            continue
        first, last = work.stages[0], work.stages[-1]
        what = f"cache of {work.cache_length:,}" if work.name == "decode" else f"{work.tokens:,} tokens"
        table = Table(f"{work.name}, batch {work.batch}, {what}", box=box.SIMPLE_HEAD)
        for column in (first.name, "after the passes", "change"):
            table.add_column(column, justify="right")
        for label, key, shown in units.COSTS:
            before, after = getattr(first, key), getattr(last, key)
            table.add_row(label, shown(before), shown(after), units.percent(before, after))
        console.print(table)
    if found.ceilings is not None and any(work.stages for work in found.workloads):
        at = found.ceilings
        console.print(f"times are predicted, not measured, for {at.device}, {at.dtype}", style="dim")
        if at.dtype != found.dtype:
            console.print(
                f"[yellow]the weights are {found.dtype}, the ceilings {at.dtype}: load it with --dtype[/yellow]"
            )


def _merged(reports: Sequence[Report]) -> list[PassReport]:
    """One entry per pass, summed over the graphs."""
    from effpass.core.report import PassReport

    total: dict[str, PassReport] = {}
    for report in reports:
        for entry in report.passes:
            into = total.setdefault(entry.name, PassReport(entry.name, entry.exact, flops=0, weight_bytes=0))
            into.hits += entry.hits
            into.refusals += entry.refusals
            into.note = into.note or entry.note
            into.flops = (into.flops or 0) + (entry.flops or 0)
            into.weight_bytes = (into.weight_bytes or 0) + (entry.weight_bytes or 0)
    return list(total.values())


def _show_pass(console: Console, entry: PassReport, in_a_step: int, verbose: bool) -> None:
    from rich.text import Text

    kind = "exact" if entry.exact else "approximate"
    line = Text.assemble((entry.name, "bold"), f" ({kind}): ")
    line.append(f"{entry.hits} rewritten", "green" if entry.hits else "yellow")
    if in_a_step != entry.hits:
        line.append(f", {in_a_step} in a decode step", "green" if in_a_step else "yellow")
    if entry.flops:
        line.append(f"; {entry.flops:+,} FLOPs a forward")
    if entry.weight_bytes:
        line.append(f"; {'+' * (entry.weight_bytes > 0)}{megabytes(entry.weight_bytes)} of weights read a forward")
    if not entry.hits and not in_a_step and not entry.refusals:
        line.append("; the model has nothing that it looks for")
    console.print(line)
    if entry.note:
        console.print(f"  {entry.note}", markup=False)
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
