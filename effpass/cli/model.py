"""What every command that takes a model has in common: its arguments, and loading."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effpass.cli.console import hide_bars, step

if TYPE_CHECKING:
    from effpass.core.model import LoadedModel
    from effpass.core.recipe import Recipe

__all__ = ["Device", "Dtype", "Json", "Model", "RecipeFile", "TrustRemoteCode", "load", "read_recipe"]

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A hub id, a folder, a GGUF file, or smollm2.", show_default=False)
]
RecipeFile = Annotated[
    Path, typer.Option("--recipe", "-r", metavar="RECIPE", help="To apply: a file, or a name.", show_default=False)
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Device = Annotated[str, typer.Option(metavar="NAME", help="Where the model runs: cpu, cuda, cuda:1, ...")]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="float32, bfloat16, float16, or auto (the checkpoint's). Default: float32 on the CPU, auto elsewhere.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout and nothing else.")]


def load(
    model: str, device: str, dtype: str | None, trust_remote_code: bool, *, images: bool = False, told: bool = True
) -> LoadedModel:
    """Load with a line of progress where it is `told`; only downloads show bars of their own."""
    if model == "smollm2" or Path(model).exists():
        hide_bars()
    from effpass.core.errors import ModelError

    with step(f"loading {model}") if told else nullcontext():
        import torch
        from transformers.utils import logging

        from effpass.core.model import load_model

        logging.disable_progress_bar()
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(
                f"device {device!r} can't be used: {str(error).partition(chr(10))[0]}", hint="use --device cpu"
            ) from error
        device_map = None if device == "cpu" else {"": device}
        return load_model(model, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code, images=images)


def read_recipe(file: Path | None) -> Recipe | None:
    """Validate the recipe before anything slow begins."""
    from effpass.core.recipe import Recipe

    return None if file is None else Recipe.load(file)
