"""`effpass optimize`: apply a recipe's weight passes once and save an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effpass.cli.console import stdout, step
from effpass.cli.model import Device, Dtype, Model, RecipeFile, TrustRemoteCode, load, read_recipe

__all__ = ["optimize"]


def optimize(
    model: Model,
    recipe: RecipeFile,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="The checkpoint to write.", show_default=False)
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Rewrite a model's weights by a recipe and save it as an ordinary checkpoint.

    Any tool that reads transformers checkpoints loads the result; the recipe is saved beside the weights. Passes that
    rewrite the graph can't be stored in a checkpoint: use them through torch.compile or `effpass export`.
    """
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
