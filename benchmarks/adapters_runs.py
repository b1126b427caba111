"""Runs of area `adapters`: one fine-tuning, supervised or by rewards, to one figure; and many (:mod:`.kept_runs`)."""

from __future__ import annotations

import ast
import copy
import json
import math
import os
import random
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import effpass
from benchmarks import kept_runs
from effpass.core.errors import EffpassError
from effpass.trainers.afa_lora import LoraSettings
from effpass.trainers.finetune.loop import HeldOut, Tuner, held_out_loss, training_arguments
from effpass.trainers.finetune.packing import PackedBatches
from effpass.trainers.finetune.samples import Sample, read_samples
from effpass.trainers.finetune.settings import Settings
from effpass.trainers.finetune.trained import make_trained
from effpass.trainers.lm.config import OptimizerConfig, Schedule
from effpass.trainers.lm.model import set_experts
from effpass.trainers.run_folder import Recorder

__all__ = ["Cycles", "Drafting", "Found", "Questions", "Run", "held_out", "results"]

# On a GPU no step waits for the device. A loss that is not finite still ends a run.
_OPTIONS: dict[str, dict[str, Any]] = {"mona": {"capturable": True, "nan_policy": "skip"}, "adamw": {"fused": True}}


@dataclass(frozen=True)
class Questions:
    """Supervised: how many of GSM8K's training questions are learned and of its test questions reported on; rows of a
    step, and their tokens."""

    train: int
    test: int
    batch: int
    length: int


@dataclass(frozen=True)
class Cycles:
    """By rewards: steps of one cycle each, prompts of a cycle, completions of a prompt and their tokens."""

    steps: int
    prompts: int
    group: int
    tokens: int


@dataclass(frozen=True)
class Drafting:
    """A draft head on the functions of the standard library: texts, steps, rows of a step and their tokens, and tokens
    that it proposes in a round."""

    head: str
    texts: int
    steps: int
    batch: int
    length: int
    proposed: int


@dataclass(frozen=True)
class Run:
    """`rank` is 0 for full fine-tuning."""

    task: Questions | Cycles | Drafting
    model: str
    device: str
    method: str
    rank: int
    optimizer: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Found:
    """What a run came to; lower is better.

    Attributes:
        value: loss of an answer's token in nats, the reward that is missing to 1, or the tokens that are missing to the
            most that a round of a draft gives; infinite where the run diverged.
        error: standard error of `value` over questions.
        seconds: of the run.
    """

    value: float
    error: float
    seconds: float


# -- many runs --------------------------------------------------------------------------------------------------------


def results(runs: Sequence[Run]) -> list[Found | None]:
    """Of each run; None where the time is over."""
    return kept_runs.results(runs, _result, lambda found: Found(**found), runs[0].device)


def _result(run: Run) -> Found:
    started = time.perf_counter()
    try:
        learn: Any = {Questions: _learn_answers, Cycles: _learn_reward, Drafting: _learn_drafting}[type(run.task)]
        value, error = learn(run, run.task)
    except EffpassError as failed:  # a rate at which the loss or a gradient is no number
        print(f"{run}: {failed.message}", flush=True)
        value, error = math.inf, math.inf
    found = Found(value, error, round(time.perf_counter() - started, 2))
    print(f"{run.method} {run.optimizer} {run.rate:g}, seed {run.seed}: {value:.4f}, {found.seconds:.1f} s", flush=True)
    return found


def _optimizer(run: Run) -> OptimizerConfig:
    options = _OPTIONS.get(run.optimizer, {}) if run.device == "cuda" else {}
    return OptimizerConfig(run.rate, run.optimizer, 0.0, options=options)  # type: ignore[arg-type]


# -- supervised -------------------------------------------------------------------------------------------------------


@cache
def _model(name: str, device: str) -> tuple[Any, Any]:
    """The model as it is trained in full, and its tokenizer."""
    loaded = effpass.load_model(name, dtype="float32")
    return loaded.model.to(device), loaded.tokenizer


@cache
def _data(name: str, device: str, task: Questions) -> tuple[list[Sample], list[Sample]]:
    """GSM8K's training questions and its test questions, the first of each."""
    place = os.environ.get("EFFPASS_DATA")
    if not place:
        raise SystemExit("adapters: EFFPASS_DATA must name a folder with gsm8k/train.jsonl and gsm8k/test.jsonl")
    found = []
    for part, count in (("train", task.train), ("test", task.test)):
        lines = (Path(place) / "gsm8k" / f"{part}.jsonl").read_text().splitlines()[:count]
        rows = [json.loads(line) for line in lines]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{part}.jsonl"
            asked = ({"prompt": f"Question: {r['question']}\nAnswer: ", "completion": r["answer"]} for r in rows)
            path.write_text("".join(f"{json.dumps(r)}\n" for r in asked))
            samples = read_samples(path, _model(name, device)[1])
        found.append([sample for sample in samples if len(sample.tokens) <= task.length])
    return found[0], found[1]


def held_out(name: str, device: str, task: Questions) -> HeldOut:
    """Loss of the test questions before anything is learned."""
    model, _ = _model(name, device)
    test = _data(name, device, task)[1]
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        return held_out_loss(model, test, PackedBatches(test, length=task.length, batch=task.batch, steps=1))


def _learn_answers(run: Run, task: Questions) -> tuple[float, float]:
    """Loss of the test questions under the finished model, its adapter linear."""
    is_cuda = run.device == "cuda"
    settings = Settings(
        _optimizer(run),
        method=run.method,  # type: ignore[arg-type]
        schedule=Schedule(warmup=2, kind="cosine", final=0.0),
        batch=task.batch,
        sequence_length=task.length,
        lora=LoraSettings(run.rank or 1),
        dtype="bfloat16" if is_cuda else "float32",
        seed=run.seed,
        log_every=1000,
        save_every=0,
    )
    train, test = _data(run.model, run.device, task)
    source, tokenizer = _model(run.model, run.device)
    model = copy.deepcopy(source)
    if settings.method != "full":
        model.to(getattr(torch, settings.dtype))
    batches = PackedBatches(
        train, length=task.length, batch=task.batch, seed=run.seed, pad=tokenizer.eos_token_id
    )  # fmt: skip
    torch.manual_seed(run.seed)
    anneal = settings.anneal.schedule(batches.steps) if settings.method == "afa-lora" else None
    trained = make_trained(model, settings.method, settings.lora, settings.anneal, anneal)
    set_experts(trained.model)
    with tempfile.TemporaryDirectory() as folder, trained.under_autocast():
        recorder = Recorder(Path(folder) / "metrics.jsonl", batches.steps, lambda line: None, ())
        args = training_arguments(settings, batches.steps, Path(folder))
        trainer = Tuner(trained, settings, args, batches, 0, recorder)
        trainer.train()
        trained.finish()
        with trainer.compute_loss_context_manager():
            found = held_out_loss(trained.model, test, batches)
    return found.loss, found.error


# -- by rewards -------------------------------------------------------------------------------------------------------


def counting(completions: list[str]) -> list[float]:
    """The toy reward: half a point for each letter that is a digit, and half for one that counts on from the last."""
    found = []
    for text in completions:
        digits = [int(letter) if letter in "0123456789" else None for letter in text]
        follows = [b is not None and a is not None and b == (a + 1) % 10 for a, b in pairwise(digits)]
        share = sum(digit is not None for digit in digits) / max(1, len(digits))
        found.append((share + sum(follows) / max(1, len(follows))) / 2)
    return found


def _learn_reward(run: Run, task: Cycles) -> tuple[float, float]:
    """What is missing to the largest reward, in the mean over the last fifth of the steps."""
    from effpass.trainers.finetune.grpo import GrpoSettings, reinforce

    is_cuda = run.device == "cuda"
    settings = GrpoSettings(
        _optimizer(run),
        method=run.method,  # type: ignore[arg-type]
        steps=task.steps,
        prompts=task.prompts,
        group=task.group,
        max_new_tokens=task.tokens,
        lora=LoraSettings(run.rank or 1),
        dtype="bfloat16" if is_cuda else "float32",
        seed=run.seed,
        save_every=0,
    )
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "prompts.jsonl"
        words = random.Random(0).choices(("cat", "tree", "seven", "river", "house", "green"), k=32)
        data.write_text("".join(json.dumps({"prompt": f"The {word} and the "}) + "\n" for word in words))
        reward = f"{__name__}:{counting.__name__}"
        out = reinforce(run.model, data, reward, Path(place) / "out", settings, say=lambda line: None)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward"] for line in lines if "reward" in line]
    return 1 - mean(rewards[-max(1, task.steps // 5) :]), 0.0


# -- a draft head -----------------------------------------------------------------------------------------------------


def functions(count: int, longest: int) -> list[str]:
    """Functions of the standard library in ASCII, evenly chosen, from 200 to `longest` characters long."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        lines = text.splitlines()
        parts = ["\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes]
        found += [part for part in parts if 200 <= len(part) <= longest and part.isascii()]
    return [found[i * len(found) // count] for i in range(min(count, len(found)))]


def _learn_drafting(run: Run, task: Drafting) -> tuple[float, float]:
    """What is missing to the most tokens that a round gives, on texts that are held out."""
    from effpass.trainers.draft.run import train_draft
    from effpass.trainers.draft.settings import Settings as DraftSettings

    is_cuda = run.device == "cuda"
    settings = DraftSettings(
        _optimizer(run),
        method=run.method,  # type: ignore[arg-type]
        schedule=Schedule(warmup=2, kind="cosine", final=0.0),
        steps=task.steps,
        batch=task.batch,
        sequence_length=task.length,
        unrolled=task.proposed,
        answers=0,
        lora=LoraSettings(run.rank or 1),
        dtype="bfloat16" if is_cuda else "float32",
        seed=run.seed,
        log_every=1000,
        save_every=0,
    )
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "functions.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in functions(task.texts, task.length)))
        out = train_draft(run.model, data, Path(place) / "out", settings, start=Path(task.head), say=lambda line: None)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lengths = [line["eval_acceptance_length"] for line in lines if "eval_acceptance_length" in line]
    return 1 + task.proposed - lengths[-1], 0.0
