"""`effpass optimize`: find a recipe for a goal, or apply a recipe's weight passes and save a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effpass.cli.console import stdout, step
from effpass.cli.model import Device, Dtype, Model, TrustRemoteCode, load, read_recipe
from effpass.core.errors import EffpassError, did_you_mean

__all__ = ["optimize"]

# Options that belong to a search.
_SEARCH = ("data", "validation", "artifact", "batch", "prompt", "new_tokens", "sequences", "passes", "trials")


def optimize(
    ctx: typer.Context,
    model: Model,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="FOLDER", help="The checkpoint, or the search, to write.", show_default=False
        ),
    ],
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe", "-r", metavar="RECIPE", help="Apply this recipe, a file or a name, and save the model."
        ),
    ] = None,
    goal: Annotated[
        str | None, typer.Option(metavar="GOAL", help="Find a recipe instead: latency, memory or throughput.")
    ] = None,
    quality_loss: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="What the perplexity may grow by: 1% or 0.01.", show_default="1%"),  # type: ignore[arg-type]
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", "-d", metavar="FILE", help="Text to calibrate with. Default: Python's reference."),
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text that losses are measured on. Default: the second half of --data."),
    ] = None,
    artifact: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="Something learned that recipes may apply; may be given again."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 1024,
    new_tokens: Annotated[int, typer.Option(min=4, help="Tokens that follow: timed, and read for the loss.")] = 64,
    sequences: Annotated[int, typer.Option(min=2, help="Pieces of text that losses are measured on.")] = 16,
    passes: Annotated[int, typer.Option(min=1, help="Passes of a recipe, at most.")] = 3,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Recipes to measure now, at most; --resume goes on.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in FOLDER.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Find a recipe that serves a goal, or apply one and save an ordinary checkpoint.

    With --goal, legal recipes are ranked by the cost model and the promising ones measured: speed and memory on the
    decode engine, perplexity on other text than the calibration's. FOLDER gets the recipe, what it needs, a log and a
    plot. Ctrl-C leaves the best recipe so far there, and --resume goes on.

    With --recipe, its passes on weights are applied once; what reads transformers checkpoints loads the result.
    """
    if (recipe is None) == (goal is None):
        given = "both" if recipe is not None else "neither"
        raise EffpassError(
            f"--goal finds a recipe and --recipe applies one: got {given}",
            hint="effpass optimize MODEL --goal latency -o FOLDER; then effpass generate MODEL -r FOLDER/recipe.yaml",
        )
    if recipe is not None:
        _refuse_given(ctx, (*_SEARCH, "quality_loss", "resume"), "--recipe applies a recipe, and searches nothing")
        _apply(model, recipe, out, overwrite, device, dtype, trust_remote_code)
        return
    _refuse_given(ctx, ("overwrite",), "a search replaces nothing")
    from effpass.cli.optimize_search import search
    from effpass.search.workload import GOALS, Workload, parse_share

    assert goal is not None
    if goal not in GOALS:
        raise EffpassError(f"--goal: got {goal!r}{did_you_mean(goal, GOALS)}")
    limit = parse_share("--quality-loss", quality_loss or "1%")
    done = search(
        model, goal, limit, Workload(batch, prompt, new_tokens, sequences), out, data=data, validation=validation,
        artifacts=artifact or [], most=passes, trials=trials, resume=resume, device=device,
        load=lambda told: load(model, device, dtype, trust_remote_code, told=told),
    )  # fmt: skip
    if not done:
        raise typer.Exit(130)


def _refuse_given(ctx: typer.Context, names: tuple[str, ...], reason: str) -> None:
    for name in names:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise EffpassError(f"--{name.replace('_', '-')}: {reason}", hint="leave it out")


def _apply(
    model: str, recipe: Path, out: Path, overwrite: bool, device: str, dtype: str | None, trust_remote_code: bool
) -> None:
    parsed = read_recipe(recipe)
    assert parsed is not None
    from effpass import api

    api.check_savable(parsed, out, overwrite=overwrite)
    loaded = load(model, device, dtype, trust_remote_code)
    with step("rewriting and saving"):
        prepared = api.prepare(loaded.model, parsed)
        api.save(prepared, out, recipe=parsed, tokenizer=loaded.tokenizer, overwrite=overwrite)
    console = stdout()
    for line in prepared.effpass_report.lines():  # type: ignore[union-attr, operator]
        console.print(line, markup=False)
    console.print(f"saved {out}", markup=False)
