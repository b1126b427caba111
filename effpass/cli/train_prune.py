"""`effpass train prune`: find out which units of a model stay, and train what is left."""

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
    Dropout,
    Dtype,
    LogEvery,
    Model,
    Optimizer,
    Output,
    Rank,
    Resume,
    SaveEvery,
    Seed,
    Targets,
    WeightDecay,
    choice,
    say,
    what_learns,
)  # fmt: skip
from effpass.core.errors import EffpassError

__all__ = ["prune"]


def prune(
    model: Model,
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="Text, or JSON lines.", show_default=False)],
    output: Output,
    keep: Annotated[float, typer.Option("--keep", help="Share of the cost that stays.")] = 0.7,
    save_model: Annotated[
        Path | None,
        typer.Option("--save-model", metavar="FOLDER", help="Train what is left, and save it.", show_default=False),
    ] = None,
    choose: Annotated[
        str, typer.Option("--choose", help="minimax, taylor, activation, magnitude, random or depth.")
    ] = "minimax",
    keep_of: Annotated[
        list[str] | None,
        typer.Option("--keep-of", metavar="UNITS=SHARE", help="A share of its own for a kind of units; repeatable."),
    ] = None,
    units: Annotated[
        str | None,
        typer.Option("--units", help="Kinds of units, with commas.", show_default="all but query_heads"),  # type: ignore[arg-type]
    ] = None,
    cost: Annotated[
        str, typer.Option("--cost", help="parameters, bytes or latency (of a decode step).")
    ] = "parameters",
    cost_batch: Annotated[int, typer.Option("--cost-batch", help="Sequences of that step.")] = 1,
    cost_context: Annotated[int, typer.Option("--cost-context", help="Positions before it.")] = 1024,
    multiple: Annotated[
        int | None,
        typer.Option("--multiple", help="Of kept channels.", show_default="128, or less for narrow layers"),  # type: ignore[arg-type]
    ] = None,
    devices: Annotated[int, typer.Option("--tensor-parallel", help="Devices that will share a layer.")] = 1,
    validation: Annotated[
        Path | None, typer.Option("--validation", metavar="FILE", help="A text to report the loss of.")
    ] = None,
    resume: Resume = False,
    method: Annotated[str, typer.Option("--method", help="What learns beside masks: full or lora.")] = "full",
    recovery: Annotated[
        str, typer.Option("--recovery", help="What learns after the cut: full, lora, afa-lora.")
    ] = "full",
    task: Annotated[float, typer.Option("--task", help="Weight of the text's own loss.")] = 0.5,
    logits: Annotated[float, typer.Option("--logits", help="Weight of the distance to the whole model.")] = 1.0,
    hidden: Annotated[float, typer.Option("--hidden", help="Weight of that of hidden states.")] = 1.0,
    optimizer: Optimizer = "mona",
    lr: Annotated[
        float | None,
        typer.Option("--lr", help="Learning rate.", show_default="1e-4 for full, 1e-3 for adapters"),  # type: ignore[arg-type]
    ] = None,
    recovery_lr: Annotated[
        float | None,
        typer.Option("--recovery-lr", help="After the cut.", show_default="1e-4 for full, 1e-3 for adapters"),  # type: ignore[arg-type]
    ] = None,
    weight_decay: WeightDecay = 0.0,
    clip: Clip = 1.0,
    steps: Annotated[int, typer.Option("--steps", help="Before and after the cut together.")] = 1000,
    learning: Annotated[float, typer.Option("--learning", help="Share of them before the cut (minimax).")] = 0.4,
    batch: Annotated[int, typer.Option("--batch", help="Rows of a step.")] = 16,
    accumulate: Accumulate = 1,
    sequence_length: Annotated[int, typer.Option("--sequence-length", help="Tokens of a row.")] = 512,
    calibration: Annotated[int, typer.Option("--calibration", help="Batches that other choosers look at.")] = 16,
    warmup: Annotated[int, typer.Option("--warmup", help="Steps of linear growth of the rate, twice.")] = 10,
    rank: Rank = 8,
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    targets: Targets = "all-linear",
    activation: ActivationName = "relu",
    anneal_end: AnnealEnd = 0.3,
    anneal: AnnealKind = "cosine",
    dtype: Dtype = None,
    seed: Seed = 0,
    log_every: LogEvery = 10,
    save_every: SaveEvery = 100,
) -> None:
    """Drop heads, channels, experts or layers, alike in every layer: an artifact, and a stock checkpoint."""
    hide_bars()
    from effpass.trainers.pruning.distillation import Distillation
    from effpass.trainers.pruning.run import prune as run
    from effpass.trainers.pruning.settings import CHOOSERS, COSTS, RATES, Settings

    choice(method, ("full", "lora"), "--method")
    choice(recovery, ("full", "lora", "afa-lora"), "--recovery")
    common = what_learns(
        method="full", optimizer=optimizer, lr=RATES[method] if lr is None else lr, schedule="cosine", warmup=0,
        weight_decay=weight_decay, clip=clip, rank=rank, alpha=alpha, dropout=dropout, targets=targets,
        activation=activation, anneal_end=anneal_end, anneal=anneal, dtype=dtype, stages=(method, recovery),
    )  # fmt: skip
    settings = Settings(
        optimizer=common["optimizer"], lora=common["lora"], anneal=common["anneal"], dtype=common["dtype"], keep=keep,
        keep_of=dict(map(_share, keep_of or [])), choose=choice(choose, CHOOSERS, "--choose"),
        units=tuple(part.strip() for part in (units or "").split(",") if part.strip()),
        cost=choice(cost, COSTS, "--cost"), cost_batch=cost_batch, cost_context=cost_context, multiple=multiple,
        devices=devices, method=method, recovery=recovery,  # type: ignore[arg-type]
        recovery_lr=RATES[recovery] if recovery_lr is None else recovery_lr,
        distillation=Distillation(task, logits, hidden), steps=steps, learning=learning, batch=batch,
        accumulate=accumulate, sequence_length=sequence_length, calibration=calibration, warmup=warmup, seed=seed,
        log_every=log_every, save_every=save_every,
    )  # fmt: skip
    run(model, data, output, settings, save_model=save_model, validation=validation, resume=resume, say=say())


def _share(given: str) -> tuple[str, float]:
    family, _, share = given.partition("=")
    try:
        return family.strip(), float(share)
    except ValueError:
        raise EffpassError(f"--keep-of: got {given!r}, expected UNITS=SHARE, as kv_groups=0.5") from None
