"""Config of a pretraining run: strict YAML, which is validated completely before work starts.

::

    version: 1
    model: {model_type: llama, hidden_size: 256, num_hidden_layers: 8, num_attention_heads: 4}
    data:
      - {text: ["$CORPUS/*.txt"], weight: 3}
      - {task: needle, weight: 1, options: {keys: 8}}
    stages:
      - {steps: 1000, sequence_length: 1024, batch: 64}
    optimizer: {name: adamw, lr: 2e-3}
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from effpass.core.errors import EffpassError, did_you_mean
from effpass.core.options import read_options, shown
from effpass.core.plain_yaml import MAX_BYTES, read_yaml
from effpass.core.user_path import expand_user

__all__ = ["Config", "OptimizerConfig", "Schedule", "Source", "Stage", "load_config"]


@dataclass(frozen=True)
class Source:
    """Source of sequences: text files, a synthetic task, or rendered pictures.

    Attributes:
        text: file patterns, relative to the folder of the config. `$NAME` stands for an environment variable, and
            `$STDLIB` for the folder of the running interpreter's standard library. A `.jsonl` file holds one document
            per line.
        task: name of a task in `effpass.trainers.lm.tasks`.
        pictures: kind of questions about pictures, a name in `effpass.trainers.lm.pictures`; for models that read
            pictures.
        weight: share of the sequences, relative to the other sources.
        options: options of the task.
    """

    text: list[str] | None = None
    task: str | None = None
    pictures: str | None = None
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if [self.text, self.task, self.pictures].count(None) != 2:
            raise ValueError("a source has either 'text' or 'task' or 'pictures'")
        if self.task is None and self.options:
            raise ValueError("'options' are a task's; text and pictures have none")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight: got {self.weight}, expected a positive number")


@dataclass(frozen=True)
class Stage:
    """Part of a run with a fixed sequence length; typically, most steps are short and the last ones are long.

    Attributes:
        steps: number of optimizer steps.
        sequence_length: number of tokens T per sequence.
        batch: number of sequences per optimizer step, over all processes.
        accumulate: number of micro-batches per process and step; the same in all stages.
    """

    steps: int
    sequence_length: int
    batch: int
    accumulate: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length: got {self.sequence_length}, expected at least 2")
        if self.batch % self.accumulate:
            raise ValueError(f"a batch of {self.batch} sequences can't be cut into {self.accumulate} micro-batches")


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimizer.

    Attributes:
        name: name of the optimizer; `mona` and `muon` orthogonalize the updates of hidden matrices and use AdamW for
            other parameters.
        lr: peak learning rate; updates of `mona` and `muon` are scaled such that the rates of AdamW suit them.
        weight_decay: decoupled weight decay, which is not applied to vectors.
        betas: coefficients of AdamW.
        clip: maximum norm of the gradient; 0 for no clipping.
        options: further arguments of the optimizer's constructor.
    """

    lr: float
    name: Literal["adamw", "muon", "mona"] = "mona"
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr: got {self.lr}, expected a positive number")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {list(self.betas)}, expected numbers from 0 to below 1")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 0")


@dataclass(frozen=True)
class Schedule:
    """Learning rate schedule over the steps of all stages.

    Attributes:
        warmup: number of steps of linear growth from 0.
        kind: `cosine`; `wsd` (constant, followed by linear decay); `constant`.
        final: final learning rate relative to `lr`.
        decay: with `wsd`, the share of the steps in which the rate decays.
    """

    warmup: int = 100
    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    final: float = 0.1
    decay: float = 0.2

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ValueError(f"warmup: got {self.warmup}, expected at least 0")
        for name in ("final", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a share from 0 to 1")


@dataclass(frozen=True)
class Config:
    """Config of a pretraining run.

    Attributes:
        model: transformers config with its `model_type`, or `{from: FOLDER}` to continue with the weights of a
            checkpoint.
        data: sources of the sequences.
        stages: stages of the run, in order.
        optimizer: optimizer with its learning rate.
        version: version of the config format.
        tokenizer: `bytes`, or a folder with a tokenizer.
        held_out: share of the text that is held out for evaluation.
        schedule: learning rate schedule.
        dtype: dtype of computation and of the saved model; master weights and optimizer state are float32.
        compile: whether to compile each decoder layer with Inductor.
        fsdp: whether to shard the model over the processes that torchrun started (FSDP2); otherwise each has a copy
            (DDP).
        seed: seed of the weights, of the order of the text and of the tasks.
        log_every: number of steps between two lines of metrics.
        evaluate_every: number of steps between evaluations; 0 for a single one at the end.
        save_every: number of steps between checkpoints, a multiple of `log_every`; 0 for no checkpoints.
    """

    model: dict[str, Any]
    data: list[Source]
    stages: list[Stage]
    optimizer: OptimizerConfig
    version: Literal[1] = 1
    tokenizer: str = "bytes"
    held_out: float = 0.01
    schedule: Schedule = field(default_factory=Schedule)
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    fsdp: bool = False
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 0
    save_every: int = 0

    def __post_init__(self) -> None:
        if not self.data or not self.stages:
            raise ValueError(f"'{'stages' if self.data else 'data'}' is empty")
        if len({stage.accumulate for stage in self.stages}) > 1:
            raise ValueError("all stages have the same 'accumulate'; give a stage of longer sequences a smaller batch")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out: got {self.held_out}, expected a share from 0 to below 1")
        if self.log_every < 1 or min(self.evaluate_every, self.save_every, self.seed) < 0:
            raise ValueError("log_every is at least 1; evaluate_every, save_every and seed are at least 0")
        if self.save_every % self.log_every:
            raise ValueError(
                f"save_every: got {self.save_every}, expected a multiple of log_every ({self.log_every}): a run that"
                " goes on from a checkpoint would lose the losses since the last line of metrics"
            )
        if self.schedule.warmup >= self.steps:
            raise ValueError(f"schedule.warmup: got {self.schedule.warmup} of {self.steps} steps")

    @property
    def steps(self) -> int:
        """Number of optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def accumulate(self) -> int:
        """Number of micro-batches per process and step."""
        return self.stages[0].accumulate


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read and validate a config file.

    Raises:
        RecipeError: if the file is not readable as YAML.
        EffpassError: if the config is invalid. The message names every fault with its path, such as ``optimizer.lrr``.
    """
    path = expand_user(path)
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    given = read_yaml(data, str(path), "config", "`version:`, `model:`, `data:`, `stages:` and `optimizer:`")
    if "version" not in given:
        raise EffpassError(f"{path}: 'version' is missing", hint="begin the config with `version: 1`")
    config, faults = read_options(Config, given, base=path.absolute().parent, where=str(path))
    faults += [] if config is None else _more_faults(config, str(path))
    if faults:
        # read_options names a top-level key "c.yaml.stepps"; recipes write "c.yaml: stepps".
        faults = [fault.replace(f"{path}.", f"{path}: ", 1) for fault in faults]
        raise EffpassError(
            faults[0] if len(faults) == 1 else "\n  ".join([f"{path}: {len(faults)} faults", *faults]),
            hint="docs/training-lm.md lists the keys",
        )
    return _resolved(config, path.absolute().parent)


def _more_faults(config: Config, where: str) -> list[str]:
    """Return the faults whose detection needs tables of other modules."""
    from effpass.trainers.lm.optimizers import option_faults
    from effpass.trainers.lm.pictures import PICTURES
    from effpass.trainers.lm.tasks import TASKS, shortest, task_faults

    faults = [f"{where}.optimizer.options.{fault}" for fault in option_faults(config.optimizer)]
    for i, source in enumerate(config.data):
        place = f"{where}.data[{i}]"
        if source.text is None and config.tokenizer != "bytes":
            faults.append(f"{place}: tasks and pictures fill sequences byte by byte and need `tokenizer: bytes`")
        if source.pictures is not None and source.pictures not in PICTURES:
            faults.append(f"{place}.pictures: unknown {source.pictures!r}{did_you_mean(source.pictures, PICTURES)}")
        if source.task is None:
            continue
        if source.task not in TASKS:
            faults.append(f"{place}.task: unknown task {source.task!r}{did_you_mean(source.task, TASKS)}")
            continue
        wrong = task_faults(source.task, source.options)
        faults += [f"{place}.options.{fault}" for fault in wrong]
        given = min(stage.sequence_length for stage in config.stages)
        needed = 0 if wrong else shortest(source.task, source.options) + 1  # and the end token
        if given < needed:
            faults.append(f"{place}: {source.task} needs {needed} tokens, and a stage has sequences of {given}")
    if "from" in config.model and len(config.model) > 1:
        others = sorted(set(config.model) - {"from"})
        faults.append(f"{where}.model: 'from' takes the config of the checkpoint; remove {', '.join(others)}")
    elif not isinstance(config.model.get("from", config.model.get("model_type")), str):
        faults.append(f"{where}.model: got {shown(config.model)}, expected 'model_type' or 'from'")
    return faults


def _resolved(config: Config, base: Path) -> Config:
    """Return the config with absolute paths of model and tokenizer."""
    from dataclasses import replace

    def absolute(text: str) -> str:
        return os.fspath(base / expand_user(text))

    model: Mapping[str, Any] = config.model
    if "from" in model:
        model = {"from": absolute(model["from"])}
    tokenizer = config.tokenizer if config.tokenizer == "bytes" else absolute(config.tokenizer)
    return replace(config, model=dict(model), tokenizer=tokenizer)
