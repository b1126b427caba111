"""`effpass train lm`: pretrain a causal language model by a config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effpass.cli.console import hide_bars, stderr

__all__ = ["lm"]


def lm(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the model goes.", show_default=False)
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in FOLDER.training.")
    ] = False,
) -> None:
    """Pretrain a causal language model on packed text and synthetic tasks; under torchrun on several devices."""
    hide_bars()
    from effpass.trainers.lm.run import train

    console = stderr()
    train(config, output, resume=resume, say=lambda line: console.print(line, markup=False, soft_wrap=True))
