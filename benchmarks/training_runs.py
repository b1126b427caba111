"""One run of area `training`: a model, an optimizer, a rate and a seed, and the curve that it writes as it goes.

Runs can share a machine in two ways. *One after the other*, `lanes=1`: with compiled layers and 32k tokens a step the
kernels take longer than their launches, so a step fills the GPU by itself. *Side by side*, `lanes=N` processes, on the
GPUs in turn: where the host is what a step waits for (small models, many matrices), each fills the others' gaps; the
kernels of one GPU take turns. Seeds stacked into one model would need grouped products under `vmap`, which torch has no
rule for. The time of a step is taken before, with nothing beside it, so that loss over time means the same in both.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.sharpness import top_eigenvalue
from benchmarks.training_data import Rows, instruction_rows, text_rows
from effpass.trainers.lm.config import OptimizerConfig, Schedule
from effpass.trainers.lm.model import compile_layers, make_model, model_config, set_experts
from effpass.trainers.lm.optimizers import make_optimizer, rate
from effpass.trainers.lm.tokenizer import load_tokenizer

__all__ = ["METHODS", "OURS", "Job", "Result", "Study", "finished", "run", "run_all", "step_seconds"]

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("adamw", {}),
    "Muon": ("mona", {"alpha": 0}),
    "MONA": ("mona", {}),
    "torch.optim.Muon": ("muon", {}),
}
OURS = ("AdamW", "Muon", "MONA")
_EVERY = 20  # steps between two points of a curve
_SHARPNESS_ROWS = 32


@dataclass(frozen=True)
class Study:
    """What all its runs share.

    Attributes:
        name: in rows and curves.
        model: a transformers config for a new model that reads bytes, or the folder of a checkpoint.
        steps, batch, length: of each run; a step reads `batch` rows of `length` tokens.
        text: files that a new model reads.
        has_sharpness: whether a run ends with the largest eigenvalue of the Hessian.
        compiled: whether the decoder layers are compiled.
        threads: of torch on a CPU; 0 leaves them.
    """

    name: str
    model: dict[str, Any] | str = field(hash=False)
    steps: int
    batch: int
    length: int
    text: tuple[str, ...] = ()
    has_sharpness: bool = False
    compiled: bool = False
    weight_decay: float = 0.1
    threads: int = 0

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.length


@dataclass(frozen=True)
class Job:
    study: Study
    method: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Result:
    """The last line of a run's curve. `losses` are nats a graded held-out token; infinite where the run diverged."""

    study: str
    method: str
    rate: float
    seed: int
    steps: int
    tokens: int
    seconds: float
    losses: dict[str, float]
    top_eigenvalue: float | None = None
    eigenvalue_error: float | None = None

    @property
    def loss(self) -> float:
        return sum(self.losses.values()) / len(self.losses)


# -- many runs -----------------------------------------------------------------------------------------------------


def run_all(jobs: Sequence[Job], device: str, curves: Path, lanes: int) -> list[Result]:
    """Results in the order of `jobs`; what `curves` has already is not run again."""
    known = {(r.study, r.method, r.rate, r.seed, r.steps): r for r in finished(curves)}
    missing = [job for job in jobs if _key(job) not in known]
    if lanes == 1 or len(missing) < 2:
        found: Iterator[Result] = (run(job, device, curves) for job in missing)
        known |= {_key(job): result for job, result in zip(missing, found, strict=True)}
    else:
        context = multiprocessing.get_context("spawn")
        count = min(lanes, len(missing))
        numbers = context.SimpleQueue()
        for number in range(count):
            numbers.put(number)
        with ProcessPoolExecutor(count, context, _take_device, (device, numbers)) as pool:
            waiting = [pool.submit(run, job, device, curves) for job in missing]
            known |= {_key(job): future.result() for job, future in zip(missing, waiting, strict=True)}
    return [known[_key(job)] for job in jobs]


def _take_device(device: str, numbers: Any) -> None:
    """A process of a lane begins on the next GPU."""
    number = numbers.get()
    if device == "cuda":
        torch.cuda.set_device(number % torch.cuda.device_count())


def finished(curves: Path) -> list[Result]:
    """Runs that came to their end; a line that a killed process left half written is passed over."""
    found = []
    for line in curves.read_text().splitlines() if curves.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "losses" in entry:
            found.append(Result(**entry))
    return found


def _key(job: Job) -> tuple[str, str, float, int, int]:
    return job.study.name, job.method, job.rate, job.seed, job.study.steps


# -- one run -------------------------------------------------------------------------------------------------------


def run(job: Job, device: str, curves: Path) -> Result:
    """Train, and append the curve's points and the result to `curves`."""
    study = job.study
    model = _prepared(study, device)
    optimizer, scheduler = _begin(job, model, device)
    rows = _rows(study, job.seed)
    head: dict[str, Any] = {"study": study.name, "method": job.method, "rate": job.rate, "seed": job.seed}
    started, losses = time.perf_counter(), torch.zeros(study.steps, device=device)
    for step in range(study.steps):
        losses[step] = _step(model, rows.batch(step, device), optimizer, scheduler, device)
        if (step + 1) % _EVERY == 0 or step + 1 == study.steps:
            recent = losses[max(0, step + 1 - _EVERY) : step + 1].mean().item()
            seconds = round(time.perf_counter() - started, 3)
            _append(curves, {**head, "step": step + 1, "seconds": seconds, "loss": recent})
            if not math.isfinite(recent):
                break
    seconds = round(time.perf_counter() - started, 3)
    is_whole = math.isfinite(losses[-1].item()) and losses[-1].item() > 0
    held_out = {
        kind: evaluate(model, ids, weights, study.batch, device) if is_whole else math.inf
        for kind, (ids, weights) in rows.held_out.items()
    }
    top: tuple[float | None, float | None] = (None, None)
    if study.has_sharpness and is_whole:
        top = _sharpness(model, next(iter(rows.held_out.values()))[0][:_SHARPNESS_ROWS].to(device))
    result = Result(**head, steps=study.steps, tokens=study.tokens, seconds=seconds, losses=held_out,
                    top_eigenvalue=top[0], eigenvalue_error=top[1])  # fmt: skip
    _append(curves, asdict(result))
    return result


def step_seconds(job: Job, device: str, steps: int) -> float:
    """Seconds of one step, of `steps` after as many that warm up, with nothing beside it."""
    job = replace(job, study=replace(job.study, steps=2 * steps))
    model = _prepared(job.study, device)
    optimizer, scheduler = _begin(job, model, device)
    rows = _rows(job.study, job.seed)
    loss, started = torch.zeros(()), 0.0
    for step in range(2 * steps):
        if step == steps:
            loss.item()  # waits for the device
            started = time.perf_counter()
        loss = _step(model, rows.batch(step, device), optimizer, scheduler, device)
    loss.item()
    return (time.perf_counter() - started) / steps


@torch.no_grad()
def evaluate(model: nn.Module, ids: Tensor, weights: Tensor | None, batch: int, device: str) -> float:
    """Nats a graded token of rows `[N, T]`."""
    model.eval()
    total, count = 0.0, 0.0
    # Compiled layers would be compiled once more for the shape of the last batch.
    with torch.compiler.set_stance("force_eager"), _autocast(device):
        for first in range(0, len(ids), batch):
            part = ids[first : first + batch].to(device)
            marks = None if weights is None else weights[first : first + batch].to(device)
            sums, graded = _sums(model(input_ids=part, use_cache=False).logits, part, marks)
            total, count = total + sums.item(), count + float(graded)
    model.train()
    return total / count


def _step(model: nn.Module, rows: tuple[Tensor, Tensor | None], optimizer: Any, scheduler: LambdaLR, device: str,
          ) -> Tensor:  # fmt: skip
    """One step; its loss, still on the device."""
    ids, weights = rows
    balance = getattr(model.config, "router_aux_loss_coef", None)
    with _autocast(device):
        asked = {} if balance is None else {"output_router_logits": True}
        outputs = model(input_ids=ids, use_cache=False, **asked)
        sums, graded = _sums(outputs.logits, ids, weights)
    loss = sums / graded
    (loss if balance is None else loss + balance * outputs.aux_loss).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return loss.detach()


def _sums(logits: Tensor, ids: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | int]:
    """The graded tokens' losses added up, and how many they are."""
    targets = ids[:, 1:].long()
    if weights is not None:
        targets = targets.masked_fill(~weights[:, 1:], -100)
    losses = cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="sum")
    return losses, targets.numel() if weights is None else weights[:, 1:].sum()


def _sharpness(model: Any, ids: Tensor) -> tuple[float, float]:
    """The top eigenvalue for the loss of `ids` in float32, by layers that can be differentiated twice."""
    before = model.config._attn_implementation, model.config._experts_implementation
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    with torch.compiler.set_stance("force_eager"):
        sums, graded = _sums(model(input_ids=ids, use_cache=False).logits, ids, None)
        found = top_eigenvalue(sums / graded, [p for p in model.parameters() if p.requires_grad])
    model.set_attn_implementation(before[0])
    model.set_experts_implementation(before[1])
    return found


# -- its parts -----------------------------------------------------------------------------------------------------


def _autocast(device: str) -> Any:
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def _prepared(study: Study, device: str) -> Any:
    """The study's model, whose weights each run sets anew: its layers are compiled once in a process."""
    return _compiled(replace(study, steps=0), device)


@functools.lru_cache(maxsize=1)
def _compiled(study: Study, device: str) -> Any:
    if study.threads:
        torch.set_num_threads(study.threads)
    torch._dynamo.config.recompile_limit = 64  # layers that differ in a number are compiled apart
    model = _new_model(study, 0).to(device).train()
    if hasattr(model.config, "num_experts"):
        set_experts(model)
    if study.compiled:
        compile_layers(model)
    return model


def _new_model(study: Study, seed: int) -> Any:
    if isinstance(study.model, str):
        config = model_config({"from": study.model}, load_tokenizer(study.model), study.length)
        return make_model(config, study.model, seed)
    return make_model(model_config(study.model, load_tokenizer("bytes"), study.length), None, seed)


@functools.lru_cache(maxsize=3)
def _rows(study: Study, seed: int) -> Rows:
    if isinstance(study.model, str):
        return instruction_rows(study.model, study.steps, study.batch, study.length, seed)
    return text_rows(study.text, study.steps, study.batch, study.length, seed)


def _begin(job: Job, model: Any, device: str) -> tuple[Any, LambdaLR]:
    """Set the weights of the job's seed, and make its optimizer and schedule."""
    model.load_state_dict(_new_model(job.study, job.seed).state_dict())
    model.zero_grad()
    name, options = METHODS[job.method]
    if device == "cuda":  # nobody waits for the device within a step
        waits_for_nothing: dict[str, dict[str, Any]] = {
            "mona": {"capturable": True, "nan_policy": "skip"},
            "adamw": {"fused": True},
        }
        options = {**options, **waits_for_nothing.get(name, {})}
    optimizer = make_optimizer(OptimizerConfig(job.rate, name, job.study.weight_decay, options=options), model)  # type: ignore[arg-type]
    schedule = Schedule(warmup=max(1, job.study.steps // 20), kind="cosine", final=0.02)
    factor: Callable[[int], float] = rate(schedule, job.study.steps)
    return optimizer, LambdaLR(optimizer, factor)


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:  # one write a line: lanes share the file
        file.write(json.dumps(line) + "\n")
