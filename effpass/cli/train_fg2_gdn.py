"""`effpass train fg2-gdn`: learn linear attention from the attention that it replaces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effpass.cli.console import hide_bars
from effpass.cli.train_options import (
    Accumulate,
    Clip,
    Dtype,
    LogEvery,
    Model,
    Optimizer,
    Output,
    Resume,
    SaveEvery,
    Seed,
    WeightDecay,
    choice,
    say,
    what_learns,
)  # fmt: skip
from effpass.core.errors import EffpassError

__all__ = ["fg2_gdn"]


def fg2_gdn(
    model: Model,
    text: Annotated[
        Path, typer.Option("--text", "--data", metavar="FILE", help="Text, or JSON lines.", show_default=False)
    ],
    output: Output,
    mode: Annotated[str, typer.Option("--mode", help="fg2+, fg2, kda or gdn.")] = "fg2+",
    share: Annotated[
        float | None, typer.Option("--share", help="Of the layers, evenly spread: 0.5 if no --layers are given.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", help="Their numbers, with commas, instead of a share.", show_default=False),
    ] = None,
    validation: Annotated[
        Path | None, typer.Option("--validation", metavar="FILE", help="A text to report the loss of.")
    ] = None,
    resume: Resume = False,
    steps: Annotated[int, typer.Option("--steps", help="Of all stages together.")] = 1000,
    align: Annotated[float, typer.Option("--align", help="Share of them for each layer's outputs.")] = 0.3,
    whole: Annotated[float, typer.Option("--whole", help="Share of them, at the end, for all weights.")] = 0.2,
    task: Annotated[float, typer.Option("--task", help="Weight of the text's own loss.")] = 0.5,
    logits: Annotated[float, typer.Option("--logits", help="Weight of the distance to the model's logits.")] = 1.0,
    hidden: Annotated[float, typer.Option("--hidden", help="Weight of that of hidden states.")] = 0.0,
    optimizer: Optimizer = "mona",
    lr: Annotated[float, typer.Option("--lr", help="Largest learning rate of the new layers.")] = 3e-3,
    whole_rate: Annotated[float, typer.Option("--whole-rate", help="Share of it for all weights.")] = 0.1,
    weight_decay: WeightDecay = 0.0,
    clip: Clip = 1.0,
    batch: Annotated[int, typer.Option("--batch", help="Rows of a step.")] = 16,
    accumulate: Accumulate = 1,
    sequence_length: Annotated[int, typer.Option("--sequence-length", help="Tokens of a row.")] = 512,
    warmup: Annotated[int, typer.Option("--warmup", help="Steps of linear growth of the rate, in each stage.")] = 10,
    gate_rank: Annotated[int, typer.Option("--gate-rank", help="Of the projections to gates.")] = 64,
    beta_rank: Annotated[int, typer.Option("--beta-rank", help="Of those to step sizes; 0 for full.")] = 0,
    conv_size: Annotated[int, typer.Option("--conv-size", help="Tokens that their convolution spans.")] = 4,
    unbounded: Annotated[
        bool, typer.Option("--unbounded", help="No lower bound of the decay: kernels are slower.")
    ] = False,
    dtype: Dtype = None,
    seed: Seed = 0,
    log_every: LogEvery = 10,
    save_every: SaveEvery = 100,
) -> None:
    """Replace attention layers by linear attention (FG²-GDN and its like): an artifact for the pass fg2_gdn."""
    hide_bars()
    from effpass.trainers.fg2_gdn.run import convert
    from effpass.trainers.fg2_gdn.settings import MODES, Settings
    from effpass.trainers.pruning.distillation import Distillation

    if layers is not None and share is not None:
        raise EffpassError("--share: --layers says which layers already", hint="give one of the two")
    common = what_learns(
        method="full", optimizer=optimizer, lr=lr, schedule="cosine", warmup=0, weight_decay=weight_decay, clip=clip,
        rank=8, alpha=None, dropout=0.0, targets="all-linear", activation="relu", anneal_end=0.3, anneal="cosine",
        dtype=dtype,
    )  # fmt: skip
    settings = Settings(
        optimizer=common["optimizer"], dtype=common["dtype"], mode=choice(mode, MODES, "--mode"),
        layers=None if layers is None else _numbers(layers), share=0.5 if share is None else share, steps=steps,
        align=align, whole=whole, whole_rate=whole_rate, distillation=Distillation(task, logits, hidden), batch=batch,
        accumulate=accumulate, sequence_length=sequence_length, warmup=warmup, gate_rank=gate_rank,
        beta_rank=beta_rank, conv_kernel_size=conv_size, lower_bound=None if unbounded else Settings.lower_bound,
        seed=seed, log_every=log_every, save_every=save_every,
    )  # fmt: skip
    convert(model, text, output, settings, validation=validation, resume=resume, say=say())


def _numbers(given: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in given.split(","))
    except ValueError:
        raise EffpassError(f"--layers: got {given!r}, expected numbers with commas, as 1,3,5") from None
