"""Area `adapters`: LoRA, AFA-LoRA and full fine-tuning, each at its best rate, and what a step of them takes.

Supervised fine-tuning on GSM8K's training questions, reported on its test questions: the negative log-likelihood of an
answer's token. A method is run at each rate with the first seed, and at its best rate with the other seeds; where that
rate is the largest or the smallest of the sweep, the row's note says so. *No gap to close* stands where LoRA, so tuned,
is within two standard errors over seeds of full fine-tuning, or ahead of it.

A run takes from seconds to minutes, and all of them together longer than a call on a borrowed device may: finished runs
are kept in the file that the environment variable `EFFPASS_RUNS` names, and a call ends after `EFFPASS_SECONDS`. Rows
come once all of their runs are there. `EFFPASS_MODEL`: the model (default `smollm2`), `EFFPASS_OPTIMIZER`: `mona`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import effpass
from benchmarks.rows import Row, measure_pair, row
from effpass.core.errors import EffpassError, ModelError
from effpass.trainers.afa_lora import LoraSettings
from effpass.trainers.finetune.loop import HeldOut, Tuner, held_out_loss, training_arguments
from effpass.trainers.finetune.packing import PackedBatches
from effpass.trainers.finetune.samples import Sample, read_samples
from effpass.trainers.finetune.settings import Settings
from effpass.trainers.finetune.trained import make_trained
from effpass.trainers.lm.config import OptimizerConfig, Schedule
from effpass.trainers.lm.model import compile_layers, set_experts
from effpass.trainers.run_folder import Recorder

AREA = "adapters"
MODELS = Path(__file__).parents[1] / "models"
SEEDS = (0, 1, 2)
RATES = {"full": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), "lora": (3e-4, 1e-3, 3e-3, 1e-2), "afa-lora": (3e-4, 1e-3, 3e-3, 1e-2)}
_STARTED = time.perf_counter()


@dataclasses.dataclass(frozen=True)
class Size:
    """What a run reads: samples to learn, samples to report on, rows of a step, tokens of a row."""

    train: int
    test: int
    batch: int
    length: int
    steps: int | None = None


# SmolLM2: one pass over 7,473 questions. On a CPU a miniature that shows that everything runs.
LARGE = Size(7473, 1319, 16, 1024)
SMALL = Size(200, 60, 2, 512, 16)
TINY = Size(24, 8, 2, 512, 2)


def _size(device: str, smoke: bool) -> Size:
    return TINY if smoke else LARGE if device == "cuda" else SMALL


# -- model and data ---------------------------------------------------------------------------------------------------


def _model_name(default: str) -> str:
    given = os.environ.get("EFFPASS_MODEL", default)
    return str(MODELS / given) if (MODELS / given / "config.json").exists() else given


@cache
def _load(name: str, device: str) -> tuple[Any, Any]:
    loaded = effpass.load_model(name, dtype="float32")
    return loaded.model.to(device), loaded.tokenizer


@cache
def _data(name: str, device: str, size: Size) -> tuple[list[Sample], list[Sample]]:
    """GSM8K's training questions and its test questions, the first of each."""
    place = os.environ.get("EFFPASS_DATA")
    if not place:
        raise SystemExit("adapters: EFFPASS_DATA must name a folder with gsm8k/train.jsonl and gsm8k/test.jsonl")
    found = []
    for part, count in (("train", size.train), ("test", size.test)):
        lines = (Path(place) / "gsm8k" / f"{part}.jsonl").read_text().splitlines()[:count]
        rows = [json.loads(line) for line in lines]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{part}.jsonl"
            asked = ({"prompt": f"Question: {r['question']}\nAnswer: ", "completion": r["answer"]} for r in rows)
            path.write_text("".join(f"{json.dumps(r)}\n" for r in asked))
            samples = read_samples(path, _load(name, device)[1])
        found.append([sample for sample in samples if len(sample.tokens) <= size.length])
    return found[0], found[1]


# -- one run ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    model: str
    method: str
    rank: int
    optimizer: str
    lr: float
    seed: int


def _kept() -> dict[Run, HeldOut]:
    path = os.environ.get("EFFPASS_RUNS")
    if not path or not Path(path).exists():
        return {}
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {Run(**line["run"]): HeldOut(**line["found"]) for line in lines}


_found: dict[Run, HeldOut] = {}


class _NoTimeError(Exception):
    """The rest is for the next call."""


def _result(run: Run, device: str, size: Size) -> HeldOut:
    if not _found:
        _found.update(_kept())
    if run not in _found:
        if time.perf_counter() - _STARTED > float(os.environ.get("EFFPASS_SECONDS", "inf")):
            raise _NoTimeError
        started = time.perf_counter()
        _found[run] = _tune(run, device, size)
        print(f"{run}: {_found[run].loss:.4f}, {time.perf_counter() - started:.1f} s", flush=True)
        if path := os.environ.get("EFFPASS_RUNS"):
            with Path(path).open("a") as file:
                line = {"run": dataclasses.asdict(run), "found": dataclasses.asdict(_found[run])}
                file.write(json.dumps(line) + "\n")
    return _found[run]


def _settings(run: Run, size: Size, device: str) -> Settings:
    return Settings(
        OptimizerConfig(lr=run.lr, name=run.optimizer, weight_decay=0.0),  # type: ignore[arg-type]
        method=run.method,  # type: ignore[arg-type]
        schedule=Schedule(warmup=2, kind="cosine", final=0.0),
        steps=size.steps,
        batch=size.batch,
        sequence_length=size.length,
        lora=LoraSettings(run.rank or 1),
        dtype="bfloat16" if device == "cuda" else "float32",
        seed=run.seed,
        log_every=1000,
        save_every=0,
    )


def _tune(run: Run, device: str, size: Size) -> HeldOut:
    """Held-out loss of the finished model, its adapter linear."""
    settings = _settings(run, size, device)
    model, tokenizer = _load(run.model, device)
    train, test = _data(run.model, device, size)
    model = copy.deepcopy(model)
    if settings.method != "full":
        model.to(getattr(torch, settings.dtype))
    batches = PackedBatches(
        train, length=size.length, batch=size.batch, steps=size.steps, seed=run.seed, pad=tokenizer.eos_token_id
    )
    torch.manual_seed(run.seed)
    anneal = settings.anneal.schedule(batches.steps) if settings.method == "afa-lora" else None
    trained = make_trained(model, settings.method, settings.lora, settings.anneal, anneal)
    set_experts(trained.model)
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(settings, batches.steps, Path(folder))
        recorder = Recorder(Path(folder) / "metrics.jsonl", batches.steps, lambda line: None, ())
        trainer = Tuner(trained, settings, args, batches, 0, recorder)
        try:
            trainer.train()
        except EffpassError as error:  # a rate at which the loss or a gradient is no number
            print(f"{run}: {error.message}")
            return HeldOut(math.inf, math.inf, 0)
        trained.finish()
        with trainer.compute_loss_context_manager():
            return held_out_loss(trained.model, test, batches)


# -- cases ------------------------------------------------------------------------------------------------------------


def _best(model: str, method: str, rank: int, device: str, smoke: bool) -> tuple[list[HeldOut], str]:
    """A method's results over seeds at its best rate, and a note."""
    size, optimizer = _size(device, smoke), os.environ.get("EFFPASS_OPTIMIZER", "mona")
    rates = RATES[method][-1:] if smoke else RATES[method] if device == "cuda" else RATES[method][1::2]
    seeds = SEEDS[:1] if smoke else SEEDS
    runs = {lr: Run(model, method, 0 if method == "full" else rank, optimizer, lr, seeds[0]) for lr in rates}
    losses = {lr: _result(run, device, size).loss for lr, run in runs.items()}
    lr = min(losses, key=lambda rate: losses[rate])
    results = [_result(dataclasses.replace(runs[lr], seed=seed), device, size) for seed in seeds]
    edge = ", at the end of the sweep" if lr in (rates[0], rates[-1]) and not smoke else ""
    return results, f"{method} {optimizer} rate {lr:g}{edge}"


def _spread(results: list[HeldOut]) -> float:
    """Standard error over seeds of the mean loss."""
    losses = [result.loss for result in results]
    return stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0


def _sft(rank: int, device: str, smoke: bool) -> Iterator[Row]:
    """Full, LoRA and AFA-LoRA of one rank, on all linear layers."""
    model = _model_name("smollm2" if device == "cuda" else "tiny-long")
    try:
        found = {method: _best(model, method, rank, device, smoke) for method in ("full", "lora", "afa-lora")}
    except _NoTimeError:
        print(f"rank {rank}: more runs are needed; call again")
        return
    size = _size(device, smoke)
    base, test = _load(model, device)[0], _data(model, device, size)[1]
    like = PackedBatches(test, length=size.length, batch=size.batch, steps=1)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        before = held_out_loss(base, test, like)
    losses = {method: mean(r.loss for r in results) for method, (results, _) in found.items()}
    errors = {method: _spread(results) for method, (results, _) in found.items()}
    seeds = len(found["lora"][0])
    case = f"{Path(model).name}, GSM8K, rank {rank}"
    sampling = found["afa-lora"][0][0].error
    notes = "; ".join(f"{note}, ±{errors[m]:.4f} over {seeds} seeds" for m, (_, note) in found.items())
    notes += f"; ±{sampling:.4f} over questions; {before.loss:.4f} before"
    for peer in ("lora", "full"):
        yield row(
            AREA, case, "loss of an answer's token, AFA-LoRA", losses["afa-lora"], "nats", device=device,
            peer=losses[peer], peer_name={"lora": "LoRA", "full": "full fine-tuning"}[peer], runs=seeds, note=notes,
        )  # fmt: skip
    if seeds < 2:
        return  # one seed gives no verdict
    gap = losses["lora"] - losses["full"]
    noise = 2 * math.hypot(errors["lora"], errors["full"])
    if gap <= noise:
        share, verdict = 0.0, f"no gap to close: LoRA is {gap:+.4f} from full fine-tuning, noise {noise:.4f}"
    else:
        share = (losses["lora"] - losses["afa-lora"]) / gap * 100
        verdict = f"gap {gap:.4f}, noise {noise:.4f}"
    yield row(AREA, case, "share of LoRA's gap to full closed", share, "%", device=device, runs=seeds, note=verdict)


def moe(device: str, smoke: bool) -> Iterator[Row]:
    """Full fine-tuning of tiny-moe by each optimiser."""
    name = _model_name("tiny-moe")
    try:
        _load(name, device)
    except ModelError as error:
        print(f"moe: {error.message}: train it first, models/README.md")
        return
    size, rates = _size(device, smoke), (3e-4, 1e-3, 3e-3)
    found: dict[str, tuple[list[HeldOut], float]] = {}
    try:
        for optimizer in ("adamw", "muon", "mona"):
            runs = {lr: Run(name, "full", 0, optimizer, lr, 0) for lr in (rates[-1:] if smoke else rates)}
            losses = {lr: _result(run, device, size).loss for lr, run in runs.items()}
            lr = min(losses, key=lambda rate: losses[rate])
            seeds = SEEDS[:1] if smoke else SEEDS
            found[optimizer] = [_result(dataclasses.replace(runs[lr], seed=s), device, size) for s in seeds], lr
    except _NoTimeError:
        print("moe: more runs are needed; call again")
        return
    ours, our_rate = found["mona"]
    for peer in ("adamw", "muon"):
        theirs, rate = found[peer]
        note = f"rates {our_rate:g} and {rate:g}; ±{_spread(ours):.4f} and ±{_spread(theirs):.4f} over seeds"
        yield row(
            AREA, f"{Path(name).name}, GSM8K, full", "loss of an answer's token, MONA", mean(r.loss for r in ours),
            "nats", device=device, peer=mean(r.loss for r in theirs), peer_name=peer, runs=len(ours), note=note,
        )  # fmt: skip


def step(device: str, smoke: bool) -> Iterator[Row]:
    """Forward and backward pass, each layer compiled by Inductor, with β moving at every step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3}  # fmt: skip
    if smoke or device == "cpu":
        shape |= {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                  "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    rows, length = (8, 1024) if device == "cuda" and not smoke else (2, 64)
    ids = torch.randint(shape["vocab_size"], (rows, length), device=device)
    calls: list[Callable[[], None]] = []
    for method in ("afa-lora", "lora"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**shape)).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
        settings = Settings(OptimizerConfig(lr=1e-3), method=method)  # type: ignore[arg-type]
        schedule = settings.anneal.schedule(1000)
        trained = make_trained(model, settings.method, LoraSettings(8), settings.anneal, schedule)
        trained.model.train()
        compile_layers(trained.model)

        def call(trained: Any = trained) -> None:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                trained.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            for parameter in trained.model.parameters():
                parameter.grad = None
            if trained.afa is not None:
                trained.afa.step()

        calls.append(call)
    torch._dynamo.utils.counters.clear()
    for call in calls:
        call()
    first = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    ours, theirs = measure_pair(calls[0], calls[1], device, warmup=3, runs=5 if smoke else 20)
    again = torch._dynamo.utils.counters["stats"]["unique_graphs"] - first
    case = f"{shape['num_hidden_layers']} layers of {shape['hidden_size']}, {rows} x {length} tokens, rank 8, compiled"
    yield row(
        AREA, case, "training step, AFA-LoRA", ours.median * 1e3, "ms", device=device, peer=theirs.median * 1e3,
        peer_name="stock PEFT LoRA", runs=ours.runs, note=f"{again} compilations while β moved; {first} before",
    )  # fmt: skip


def grpo(device: str, smoke: bool) -> Iterator[Row]:
    """Reward after reinforcement learning on a toy: completions made of digits."""
    if importlib.util.find_spec("trl") is None:
        print("grpo: trl is not installed")
        return
    from effpass.trainers.finetune.grpo import GrpoSettings, reinforce

    model = _model_name("smollm2" if device == "cuda" else "tiny-long")
    steps, tokens = (2, 4) if smoke else (60, 32) if device == "cuda" else (20, 12)
    seeds = SEEDS[:1] if smoke else SEEDS
    rates = {"full": 1e-4, "lora": 3e-3, "afa-lora": 3e-3}
    rewards: dict[str, list[float]] = {}
    for method, lr in rates.items():
        for seed in seeds:
            settings = GrpoSettings(
                OptimizerConfig(lr=lr, weight_decay=0.0), method=method, steps=steps, prompts=4,  # type: ignore[arg-type]
                group=8, max_new_tokens=tokens, dtype="bfloat16" if device == "cuda" else "float32", seed=seed,
                save_every=0,
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as place:
                data = Path(place) / "prompts.jsonl"
                words = random.Random(0).choices(("cat", "tree", "seven", "river", "house", "green"), k=32)
                data.write_text("".join(json.dumps({"prompt": f"The {word} and the "}) + "\n" for word in words))
                out = reinforce(
                    model, data, "benchmarks.adapters:digits", Path(place) / "out", settings, say=lambda line: None
                )
                lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            last = [line["reward"] for line in lines if "reward" in line][-max(1, steps // 5) :]
            rewards.setdefault(method, []).append(mean(last))
            print(f"grpo {method}, seed {seed}: {rewards[method][-1]:.3f}", flush=True)
    for peer in ("lora", "full"):
        yield row(
            AREA, f"{Path(model).name}, GRPO, toy reward, rank 8", "mean reward of the last fifth, AFA-LoRA",
            mean(rewards["afa-lora"]), "", device=device, peer=mean(rewards[peer]), peer_name=peer,
            lower_is_better=False, runs=len(seeds),
            note="; ".join(f"{m} {', '.join(f'{r:.3f}' for r in found)}" for m, found in rewards.items())
            + f"; rates {rates}, {steps} steps",
        )  # fmt: skip


def digits(completions: list[str]) -> list[float]:
    """The toy reward: the share of digits."""
    return [sum(letter.isdigit() for letter in text) / max(1, len(text)) for text in completions]


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    "step": step,
    **{f"rank-{rank}": functools.partial(_sft, rank) for rank in (8, 1, 64)},
    "moe": moe,
    "grpo": grpo,
}
