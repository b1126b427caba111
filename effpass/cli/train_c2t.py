"""`effpass train c2t`: the classifier of C2T's trees."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effpass.cli.console import hide_bars
from effpass.cli.train_options import Data, Dtype, Model, Seed, say

__all__ = ["c2t"]


def c2t(
    model: Model,
    data: Data,
    draft: Annotated[
        str, typer.Option("--draft", metavar="DRAFT", help="Folder of a head or a model.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Where it goes.", show_default="DRAFT/c2t"),  # type: ignore[arg-type]
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", help="Children of a node, and nodes of a layer.")] = 8,
    depth: Annotated[int, typer.Option("--depth", help="Layers of a tree.")] = 5,
    trees: Annotated[int, typer.Option("--trees", help="Trees to learn from.")] = 4000,
    answers: Annotated[int, typer.Option("--answers", help="Tokens of an answer, at most.")] = 128,
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the trees.")] = 10,
    dtype: Dtype = None,
    seed: Seed = 0,
) -> None:
    """Learn which nodes of a draft's trees MODEL accepts, from its answers to prompts."""
    hide_bars()
    import torch

    from effpass.backend import DecodeBackend
    from effpass.trainers.c2t.run import train_c2t

    is_cuda = torch.cuda.is_available()
    train_c2t(
        model, draft, data, Path(draft, "c2t") if output is None else output, top_k=top_k, depth=depth, trees=trees,
        answer=answers, epochs=epochs, seed=seed, dtype=dtype or ("bfloat16" if is_cuda else "float32"),
        device="cuda" if is_cuda else "cpu", backend=DecodeBackend(), say=say(),
    )  # fmt: skip
