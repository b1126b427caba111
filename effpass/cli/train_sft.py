"""`effpass train sft` and `effpass train afa-lora`: supervised fine-tuning on JSON lines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effpass.cli.console import hide_bars
from effpass.cli.train_options import (
    Accumulate,
    ActivationName,
    Alpha,
    Anchor,
    AnnealEnd,
    AnnealKind,
    Attention,
    Balance,
    Clip,
    Compile,
    ContextParallel,
    Data,
    Dropout,
    Dtype,
    Guard,
    Latencies,
    LogEvery,
    Lr,
    Method,
    Model,
    Optimizer,
    Output,
    Rank,
    Resume,
    SaveEvery,
    Schedule,
    Seed,
    SparseBlock,
    SparseBudget,
    Targets,
    Warmup,
    WeightDecay,
    say,
    sparse_settings,
    what_learns,
)  # fmt: skip

__all__ = ["afa_lora", "sft"]

Validation = Annotated[
    Path | None, typer.Option("--validation", metavar="FILE", help="Held-out samples.", show_default=False)
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", help="Optimizer steps.", show_default="those of --epochs"),  # type: ignore[arg-type]
]
Epochs = Annotated[int, typer.Option("--epochs", help="Passes over the data.")]
Batch = Annotated[int, typer.Option("--batch", help="Rows of packed samples in a step.")]
SequenceLength = Annotated[
    int | None,
    typer.Option("--sequence-length", help="Tokens of a row.", show_default="the longest sample"),  # type: ignore[arg-type]
]
Packing = Annotated[bool, typer.Option("--packing/--no-packing", help="Several samples in a row.")]
EvaluateEvery = Annotated[
    int, typer.Option("--evaluate-every", help="Steps between evaluations; 0 for the first and the last.")
]


def sft(
    model: Model,
    data: Data,
    output: Output,
    method: Method = "full",
    validation: Validation = None,
    resume: Resume = False,
    optimizer: Optimizer = "mona",
    lr: Lr = None,
    lr_schedule: Schedule = "cosine",
    warmup: Warmup = 0,
    weight_decay: WeightDecay = 0.0,
    clip: Clip = 1.0,
    steps: Steps = None,
    epochs: Epochs = 1,
    batch: Batch = 16,
    accumulate: Accumulate = 1,
    sequence_length: SequenceLength = None,
    packing: Packing = True,
    rank: Rank = 8,
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    targets: Targets = "all-linear",
    activation: ActivationName = "relu",
    anneal_end: AnnealEnd = 0.3,
    anneal: AnnealKind = "cosine",
    dtype: Dtype = None,
    compile_layers: Compile = False,
    attention: Attention = None,
    attention_budget: SparseBudget = 8192,
    attention_block: SparseBlock = 256,
    context_parallel: ContextParallel = 1,
    balance: Balance = False,
    anchor: Anchor = "mean",
    guard: Guard = 0.1,
    latency_table: Latencies = None,
    seed: Seed = 0,
    log_every: LogEvery = 10,
    evaluate_every: EvaluateEvery = 0,
    save_every: SaveEvery = 100,
) -> None:
    """Fine-tune on completions: `messages`, `prompt` with `completion`, or `text`, one object a line."""
    hide_bars()
    from effpass.trainers.finetune.run import tune
    from effpass.trainers.finetune.settings import Settings

    common = what_learns(
        method=method, optimizer=optimizer, lr=lr, schedule=lr_schedule, warmup=warmup, weight_decay=weight_decay,
        clip=clip, rank=rank, alpha=alpha, dropout=dropout, targets=targets, activation=activation,
        anneal_end=anneal_end, anneal=anneal, dtype=dtype,
    )  # fmt: skip
    sparse = sparse_settings(attention, attention_budget, attention_block, balance, anchor, guard)
    settings = Settings(
        **common, steps=steps, epochs=epochs, batch=batch, accumulate=accumulate, sequence_length=sequence_length,
        is_packed=packing, compile=compile_layers, sparse=sparse, context=context_parallel, seed=seed,
        log_every=log_every, evaluate_every=evaluate_every, save_every=save_every,
    )  # fmt: skip
    tune(model, data, output, settings, validation=validation, latencies=latency_table, resume=resume, say=say())


def afa_lora(
    model: Model,
    data: Data,
    output: Output,
    validation: Validation = None,
    resume: Resume = False,
    optimizer: Optimizer = "mona",
    lr: Lr = None,
    lr_schedule: Schedule = "cosine",
    warmup: Warmup = 0,
    weight_decay: WeightDecay = 0.0,
    clip: Clip = 1.0,
    steps: Steps = None,
    epochs: Epochs = 1,
    batch: Batch = 16,
    accumulate: Accumulate = 1,
    sequence_length: SequenceLength = None,
    packing: Packing = True,
    rank: Rank = 8,
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    targets: Targets = "all-linear",
    activation: ActivationName = "relu",
    anneal_end: AnnealEnd = 0.3,
    anneal: AnnealKind = "cosine",
    dtype: Dtype = None,
    compile_layers: Compile = False,
    attention: Attention = None,
    attention_budget: SparseBudget = 8192,
    attention_block: SparseBlock = 256,
    context_parallel: ContextParallel = 1,
    balance: Balance = False,
    anchor: Anchor = "mean",
    guard: Guard = 0.1,
    latency_table: Latencies = None,
    seed: Seed = 0,
    log_every: LogEvery = 10,
    evaluate_every: EvaluateEvery = 0,
    save_every: SaveEvery = 100,
) -> None:
    """Fine-tune an adapter with an activation that is annealed away; the result is a stock PEFT LoRA adapter."""
    sft(**{**locals(), "method": "afa-lora"})
