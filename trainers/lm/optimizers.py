"""Optimizers that a config can name, and the learning rate schedule; used by all trainers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from effpass.core.errors import EffpassError, did_you_mean
from effpass.trainers.lm.config import OptimizerConfig, Schedule

__all__ = ["STATE_BYTES", "make_optimizer", "option_faults", "rate"]

# Bytes of optimizer state per parameter of a matrix: AdamW keeps two moments, Muon one buffer, MONA two.
STATE_BYTES = {"adamw": 8, "muon": 4, "mona": 8}

_TAKEN = ("self", "params", "lr", "weight_decay", "betas", "replicas")


def option_faults(config: OptimizerConfig) -> list[str]:
    """Return what is wrong with `config.options`; empty if they are valid."""
    parameters = inspect.signature(_constructor(config.name).__init__).parameters
    known = [name for name in parameters if name not in _TAKEN]
    return [f"{name}: unknown option{did_you_mean(name, known)}" for name in config.options if name not in known]


def make_optimizer(config: OptimizerConfig, model: nn.Module, replicas: Any = None) -> Optimizer:
    """Return the optimizer of the parameters of a model.

    Args:
        config: settings of the optimizer.
        model: model as it is trained.
        replicas: process group whose ranks hold equal copies of the model and share MONA's work; None for a single
            process or a sharded model.

    Raises:
        EffpassError: if the constructor of the optimizer raises an error.
    """
    matrices, vectors = _split(model)
    try:
        if config.name == "mona":
            options = {"betas": config.betas, "replicas": replicas, **config.options}
            return _constructor("mona")(model, lr=config.lr, weight_decay=config.weight_decay, **options)
        if config.name == "muon":
            return _MuonWithAdamW(config, *_hidden(model))
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return AdamW(groups, lr=config.lr, betas=config.betas, **config.options)
    except (TypeError, ValueError) as error:
        raise EffpassError(f"optimizer: {config.name} can't be made: {error}") from error


def rate(schedule: Schedule, steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate as a function of the step, counted from 0, in a run of `steps` steps."""

    def factor(step: int) -> float:
        if step < schedule.warmup:
            return (step + 1) / schedule.warmup
        if schedule.kind == "constant":
            return 1.0
        begin = (
            schedule.warmup if schedule.kind == "cosine" else max(schedule.warmup, round(steps * (1 - schedule.decay)))
        )
        done = min(1.0, max(0, step - begin) / max(1, steps - 1 - begin))
        share = (1 + math.cos(math.pi * done)) / 2 if schedule.kind == "cosine" else 1 - done
        return schedule.final + (1 - schedule.final) * share

    return factor


class _MuonWithAdamW(Optimizer):
    """`torch.optim.Muon` for hidden matrices and AdamW for the other parameters, as one optimizer.

    The parameter groups are those of the two optimizers, so that a scheduler sets the learning rates of both.
    """

    def __init__(self, config: OptimizerConfig, matrices: list[nn.Parameter], others: list[nn.Parameter]) -> None:
        options = {"adjust_lr_fn": "match_rms_adamw", **config.options}  # makes the rates of AdamW suitable
        muon = _constructor("muon")(matrices, lr=config.lr, weight_decay=config.weight_decay, **options)
        groups = [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        adamw = AdamW([group for group in groups if group["params"]], lr=config.lr, betas=config.betas)
        self.parts: dict[str, Optimizer] = {"muon": muon, "adamw": adamw}
        super().__init__(muon.param_groups + adamw.param_groups, {})
        self._share()

    def _share(self) -> None:
        """Use the parameter groups of the two optimizers, which loading a state replaces."""
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts.values():
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self._share()


def _constructor(name: str) -> Any:
    if name == "adamw":
        return AdamW
    if name == "muon":
        return torch.optim.Muon
    from effpass.trainers import MONA

    return MONA


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters with two or more dimensions, and the others."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    return [p for p in wanted if p.ndim > 1], [p for p in wanted if p.ndim < 2]


def _hidden(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the matrices that MONA orthogonalizes, and the rest: embeddings, head, routers, norms, stacked experts."""
    from effpass.trainers.mona import choose

    inner = {id(c.parameter) for c in choose(model) if c.algorithm == "mona" and c.parameter.ndim == 2}
    wanted = [p for p in model.parameters() if p.requires_grad]
    return [p for p in wanted if id(p) in inner], [p for p in wanted if id(p) not in inner]
