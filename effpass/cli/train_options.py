"""Options that the fine-tuning commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from effpass.cli.console import stderr
from effpass.core.errors import EffpassError, did_you_mean

__all__ = [
    "Accumulate",
    "ActivationName",
    "Alpha",
    "Anchor",
    "AnnealEnd",
    "AnnealKind",
    "Attention",
    "Balance",
    "Clip",
    "Compile",
    "ContextParallel",
    "Data",
    "Dropout",
    "Dtype",
    "Guard",
    "Latencies",
    "LogEvery",
    "Lr",
    "Method",
    "Model",
    "Optimizer",
    "Output",
    "Rank",
    "Resume",
    "SaveEvery",
    "Schedule",
    "Seed",
    "SparseBlock",
    "SparseBudget",
    "Targets",
    "Warmup",
    "WeightDecay",
    "choice",
    "say",
    "sparse_settings",
    "what_learns",
]  # fmt: skip

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, hub id, GGUF file or `smollm2`.", show_default=False)
]
Data = Annotated[Path, typer.Option("--data", metavar="FILE", help="JSON lines.", show_default=False)]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the result goes.", show_default=False)
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in FOLDER.training.")]
Method = Annotated[str, typer.Option("--method", help="What learns: full (all weights), lora or afa-lora.")]
Optimizer = Annotated[str, typer.Option("--optimizer", help="mona, muon or adamw.")]
Lr = Annotated[
    float | None,
    typer.Option("--lr", help="Largest learning rate.", show_default="2e-5 for full, 2e-4 for adapters"),  # type: ignore[arg-type]
]
Schedule = Annotated[str, typer.Option("--lr-schedule", help="cosine, wsd or constant.")]
Warmup = Annotated[int, typer.Option("--warmup", help="Steps of linear growth of the rate.")]
WeightDecay = Annotated[float, typer.Option("--weight-decay", help="Decoupled; none on vectors.")]
Clip = Annotated[float, typer.Option("--clip", help="Largest norm of the gradient; 0 for no clipping.")]
Accumulate = Annotated[int, typer.Option("--accumulate", help="Micro-batches of a step: more of them, less memory.")]
Rank = Annotated[int, typer.Option("--rank", help="Of the adapter.")]
Alpha = Annotated[
    float | None,
    typer.Option("--alpha", help="The adapter's scale is alpha / rank.", show_default="2 rank"),  # type: ignore[arg-type]
]
Dropout = Annotated[float, typer.Option("--dropout", help="On the adapter's input.")]
Targets = Annotated[
    str, typer.Option("--targets", help="Ends of the names of layers to adapt, with commas; or all-linear.")
]
ActivationName = Annotated[str, typer.Option("--activation", help="Of an AFA adapter: relu, silu or gelu.")]
AnnealEnd = Annotated[float, typer.Option("--anneal-end", help="Share of the steps after which it is gone, to 0.9.")]
AnnealKind = Annotated[str, typer.Option("--anneal", help="How it goes: cosine or linear.")]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="float32 or bfloat16.", show_default="bfloat16 on a GPU"),  # type: ignore[arg-type]
]
Compile = Annotated[bool, typer.Option("--compile", help="Compile each layer with Inductor.")]
Seed = Annotated[int, typer.Option("--seed")]
Attention = Annotated[
    str | None,
    typer.Option("--attention", help="sparse: to blocks of keys that tokens choose.", show_default="the model's own"),  # type: ignore[arg-type]
]
SparseBudget = Annotated[int, typer.Option("--attention-budget", help="Keys that a token attends to, when sparse.")]
SparseBlock = Annotated[int, typer.Option("--attention-block", help="Keys of a block: 32, 64, 128, 256 or 512.")]
ContextParallel = Annotated[
    int, typer.Option("--context-parallel", help="Processes that share each row, with sparse attention.")
]
Balance = Annotated[
    bool, typer.Option("--balance", help="Move sparse budgets and samples so that processes do not wait.")
]
Anchor = Annotated[str, typer.Option("--anchor", help="Whose time balance aims at: mean, min or max.")]
Guard = Annotated[float, typer.Option("--guard", help="How far the covered share of the router's weight may move.")]
Latencies = Annotated[
    Path | None,
    typer.Option("--latency-table", metavar="FILE", help="Instead of measuring.", show_default=False),
]
LogEvery = Annotated[int, typer.Option("--log-every", help="Steps between two lines of metrics.")]
SaveEvery = Annotated[int, typer.Option("--save-every", help="Steps between checkpoints; 0 for none.")]


def say() -> Callable[[str], None]:
    """Progress, a line at a time, on stderr."""
    console = stderr()
    return lambda line: console.print(line, markup=False, soft_wrap=True)


def choice(value: str, known: tuple[str, ...], option: str) -> Any:
    """`value`, when it is one of those known."""
    if value not in known:
        raise EffpassError(f"{option}: got {value!r}{did_you_mean(value, known)}")
    return value


def _refuse_idle(option: str, is_idle: bool, switch: str) -> None:
    """Refuse an option that was given and that nothing reads."""
    if is_idle:
        raise EffpassError(f"{option} does nothing without {switch}", hint=f"add {switch}, or leave {option} out")


def sparse_settings(attention: str | None, budget: int, block: int, balance: bool, anchor: str, guard: float) -> Any:
    """Settings of sparse attention; None without it."""
    from effpass.trainers.finetune.settings import Sparse

    if attention is not None:
        choice(attention, ("sparse",), "--attention")
    elif balance:
        raise EffpassError("--balance moves budgets of sparse attention", hint="add --attention sparse")
    usual = Sparse()
    changed = {
        "--attention-budget": budget != usual.budget,
        "--attention-block": block != usual.block,
        "--anchor": anchor != usual.anchor,
        "--guard": guard != usual.p,
    }
    for option in ("--attention-budget", "--attention-block"):
        _refuse_idle(option, changed[option] and attention is None, "--attention sparse")
    for option in ("--anchor", "--guard"):
        _refuse_idle(option, changed[option] and not balance, "--balance")
    if attention is None:
        return None
    chosen = choice(anchor, ("mean", "min", "max"), "--anchor")
    return Sparse(budget, block, is_balanced=balance, anchor=chosen, p=guard)


def what_learns(
    *, method: str, optimizer: str, lr: float | None, schedule: str, warmup: int, weight_decay: float, clip: float,
    rank: int, alpha: float | None, dropout: float, targets: str, activation: str, anneal_end: float, anneal: str,
    dtype: str | None, stages: tuple[str, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    """The settings that all of the commands have, from their options; `stages` where several methods learn in turn."""
    import torch

    from effpass.trainers.afa_lora import LoraSettings
    from effpass.trainers.finetune.settings import RATES, Anneal
    from effpass.trainers.lm.config import OptimizerConfig
    from effpass.trainers.lm.config import Schedule as Rates

    method = choice(method, ("full", "lora", "afa-lora"), "--method")
    if dtype is None:
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    names = tuple(part.strip() for part in targets.split(",") if part.strip())
    usual, own = LoraSettings(), Anneal()
    changed = {
        "--rank": rank != usual.rank, "--alpha": alpha is not None, "--dropout": dropout != usual.dropout,
        "--targets": names != ("all-linear",), "--activation": activation != own.activation,
        "--anneal-end": anneal_end != own.end, "--anneal": anneal != own.kind,
    }  # fmt: skip
    try:
        found = {
            "method": method,
            "optimizer": OptimizerConfig(
                lr=RATES[method] if lr is None else lr,
                name=choice(optimizer, ("mona", "muon", "adamw"), "--optimizer"),
                weight_decay=weight_decay,
                clip=clip,
            ),
            "schedule": Rates(warmup, choice(schedule, ("cosine", "wsd", "constant"), "--lr-schedule")),
            "lora": LoraSettings(rank, alpha, dropout, names[0] if len(names) == 1 else names),
            "anneal": Anneal(activation, end=anneal_end, kind=choice(anneal, ("cosine", "linear"), "--anneal")),
            "dtype": choice(dtype, ("float32", "bfloat16"), "--dtype"),
        }
    except ValueError as error:  # the words of a settings class
        raise EffpassError(str(error)) from error
    for option, is_changed in changed.items():
        kinds = ("afa-lora",) if option in ("--activation", "--anneal-end", "--anneal") else ("lora", "afa-lora")
        _refuse_idle(option, is_changed and not set(kinds) & set(stages or (method,)), f"method {' or '.join(kinds)}")
    return found
