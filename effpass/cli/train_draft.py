"""`effpass train draft`: an EAGLE-3 head for speculative decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effpass.cli.console import hide_bars
from effpass.cli.train_options import (
    Accumulate,
    ActivationName,
    Alpha,
    AnnealEnd,
    AnnealKind,
    Clip,
    Data,
    Dropout,
    Dtype,
    LogEvery,
    Model,
    Optimizer,
    Output,
    Rank,
    Resume,
    SaveEvery,
    Schedule,
    Seed,
    WeightDecay,
    say,
    what_learns,
)  # fmt: skip
from effpass.core.errors import EffpassError

__all__ = ["draft"]


def draft(
    model: Model,
    data: Data,
    output: Output,
    start: Annotated[
        Path | None, typer.Option("--from", metavar="HEAD", help="Go on from this head.", show_default=False)
    ] = None,
    method: Annotated[str, typer.Option("--method", help="What learns: full (the head), lora or afa-lora.")] = "full",
    resume: Resume = False,
    optimizer: Optimizer = "mona",
    lr: Annotated[
        float | None,
        typer.Option("--lr", help="Largest learning rate.", show_default="5e-4"),  # type: ignore[arg-type]
    ] = None,
    lr_schedule: Schedule = "cosine",
    warmup: Annotated[int, typer.Option("--warmup", help="Steps of linear growth of the rate.")] = 50,
    weight_decay: WeightDecay = 0.0,
    clip: Clip = 1.0,
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="Optimizer steps.", show_default="those of --epochs"),  # type: ignore[arg-type]
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the data.")] = 2,
    batch: Annotated[int, typer.Option("--batch", help="Rows of packed texts in a step.")] = 16,
    accumulate: Accumulate = 1,
    sequence_length: Annotated[
        int | None,
        typer.Option("--sequence-length", help="Tokens of a row.", show_default="the longest text"),  # type: ignore[arg-type]
    ] = None,
    vocabulary: Annotated[
        int, typer.Option("--vocabulary", help="Tokens that the head proposes: the most frequent ones.")
    ] = 16384,
    taps: Annotated[
        str | None,
        typer.Option("--taps", help="Layers to read, with commas.", show_default="2, the middle, the last but three"),  # type: ignore[arg-type]
    ] = None,
    unrolled: Annotated[int, typer.Option("--unrolled", help="Steps that the head is run for, as in use.")] = 5,
    decay: Annotated[float, typer.Option("--decay", help="Weight of a step relative to the one before.")] = 0.8,
    answers: Annotated[
        int,
        typer.Option("--answers", help="Tokens of the model's answer to a prompt; 0 learns from texts as they are."),
    ] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="Of the answers; 0 for the best tokens.")] = 0.7,
    rank: Rank = 8,
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    activation: ActivationName = "relu",
    anneal_end: AnnealEnd = 0.3,
    anneal: AnnealKind = "cosine",
    dtype: Dtype = None,
    seed: Seed = 0,
    log_every: LogEvery = 10,
    evaluate_every: Annotated[
        int, typer.Option("--evaluate-every", help="Steps between evaluations; 0 for the first and the last.")
    ] = 50,
    save_every: SaveEvery = 100,
) -> None:
    """Learn an EAGLE-3 head, a draft for MODEL, from the model's own answers to prompts."""
    hide_bars()
    from effpass.trainers.draft.run import train_draft
    from effpass.trainers.draft.settings import RATE, Settings

    common = what_learns(
        method=method, optimizer=optimizer, lr=RATE if lr is None else lr, schedule=lr_schedule, warmup=warmup,
        weight_decay=weight_decay, clip=clip, rank=rank, alpha=alpha, dropout=dropout, targets="all-linear",
        activation=activation, anneal_end=anneal_end, anneal=anneal, dtype=dtype,
    )  # fmt: skip
    settings = Settings(
        **common, steps=steps, epochs=epochs, batch=batch, accumulate=accumulate, sequence_length=sequence_length,
        vocabulary=vocabulary, taps=_numbers(taps), unrolled=unrolled, decay=decay, answers=answers,
        temperature=temperature, seed=seed, log_every=log_every, evaluate_every=evaluate_every, save_every=save_every,
    )  # fmt: skip
    train_draft(model, data, output, settings, start=start, resume=resume, say=say())


def _numbers(taps: str | None) -> tuple[int, ...] | None:
    try:
        return None if taps is None else tuple(int(part) for part in taps.split(","))
    except ValueError as error:
        raise EffpassError(f"--taps: got {taps!r}", hint="numbers of layers with commas: 2,15,27") from error
