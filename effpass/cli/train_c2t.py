"""`effpass train c2t`: the classifier of C2T's trees."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effpass.cli.console import hide_bars
from effpass.cli.train_options import Data, Dtype, Model, Seed, say
from effpass.core.errors import EffpassError
from effpass.core.user_path import expand_user

__all__ = ["c2t"]


def c2t(
    model: Model,
    data: Data,
    draft: Annotated[
        str, typer.Option("--draft", metavar="DRAFT", help="A head, a model or layers:0,1,5.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Where it goes.", show_default="DRAFT/c2t of a folder"),  # type: ignore[arg-type]
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
    if output is None:
        if not expand_user(draft).is_dir():
            raise EffpassError(
                f"--draft {draft} is no folder that the classifier could go into",
                hint="-o FOLDER, which effpass generate takes as --tree c2t:classifier=FOLDER",
            )
        output = expand_user(draft) / "c2t"
    hide_bars()
    import torch

    from effpass.backend import DecodeBackend
    from effpass.trainers.c2t.run import train_c2t

    is_cuda = torch.cuda.is_available()
    train_c2t(
        model, draft, data, output, top_k=top_k, depth=depth, trees=trees, answer=answers, epochs=epochs, seed=seed,
        dtype=dtype or ("bfloat16" if is_cuda else "float32"), device="cuda" if is_cuda else "cpu",
        backend=DecodeBackend(), say=say(),
    )  # fmt: skip
