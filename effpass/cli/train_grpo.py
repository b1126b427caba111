"""`effpass train grpo`: reinforcement learning against a reward that the user wrote."""

from __future__ import annotations

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
    Dtype,
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
    Targets,
    Warmup,
    WeightDecay,
    say,
    what_learns,
)  # fmt: skip

__all__ = ["grpo"]

Reward = Annotated[
    str,
    typer.Option(
        "--reward",
        metavar="MODULE:FUNCTION",
        help="Python code of yours: f(prompts, completions, FIELD, …) -> numbers.",
        show_default=False,
    ),
]


def grpo(
    model: Model,
    data: Data,
    reward: Reward,
    output: Output,
    method: Method = "lora",
    resume: Resume = False,
    optimizer: Optimizer = "mona",
    lr: Lr = None,
    lr_schedule: Schedule = "constant",
    warmup: Warmup = 0,
    weight_decay: WeightDecay = 0.0,
    clip: Clip = 1.0,
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps.")] = 100,
    prompts: Annotated[int, typer.Option("--prompts", help="Of a cycle of sampling and learning.")] = 8,
    group: Annotated[int, typer.Option("--group", help="Completions of a prompt.")] = 8,
    updates: Annotated[int, typer.Option("--updates", help="Optimizer steps of a cycle.")] = 1,
    accumulate: Accumulate = 1,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Of a completion.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="Of sampling.")] = 1.0,
    kl: Annotated[float, typer.Option("--kl", help="Weight of the divergence from the model before.")] = 0.0,
    clip_ratio: Annotated[float, typer.Option("--clip-ratio", help="Of the policy ratio.")] = 0.2,
    rank: Rank = 8,
    alpha: Alpha = None,
    targets: Targets = "all-linear",
    activation: ActivationName = "relu",
    anneal_end: AnnealEnd = 0.3,
    anneal: AnnealKind = "cosine",
    dtype: Dtype = None,
    seed: Seed = 0,
    log_every: LogEvery = 1,
    save_every: SaveEvery = 50,
) -> None:
    """Learn from the rewards of sampled completions (GRPO, by TRL); data: `prompt` and what the reward needs."""
    hide_bars()
    from effpass.trainers.finetune.grpo import GrpoSettings, reinforce

    common = what_learns(
        method=method, optimizer=optimizer, lr=lr, schedule=lr_schedule, warmup=warmup, weight_decay=weight_decay,
        clip=clip, rank=rank, alpha=alpha, dropout=0.0, targets=targets, activation=activation,
        anneal_end=anneal_end, anneal=anneal, dtype=dtype,
    )  # fmt: skip
    settings = GrpoSettings(
        **common, steps=steps, prompts=prompts, group=group, updates=updates, accumulate=accumulate,
        max_new_tokens=max_new_tokens, temperature=temperature, kl=kl, clip_ratio=clip_ratio, seed=seed,
        log_every=log_every, save_every=save_every,
    )  # fmt: skip
    reinforce(model, data, reward, output, settings, resume=resume, say=say())
