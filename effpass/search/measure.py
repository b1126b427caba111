"""One recipe, measured: time of a step and of a prompt, bytes that stay, and the loss of text that is read.

Tokens of the text are fed one at a time through the decode engine, as generation does it, so that what a pass drops
from the cache, or does not read of it, is in the loss. The first token is the prompt's to predict.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from effpass.core.errors import EffpassError, ModelError
from effpass.core.model import inner_model
from effpass.search.recipes import Candidate
from effpass.search.workload import Goal, Workload

__all__ = ["Trial", "held_bytes", "losses_of", "measure", "prepared", "try_out"]

_UNTIMED = 2  # steps of a session that warm up
_ROWS = 8  # sequences whose losses a CPU works out together


@dataclass
class Trial:
    """What became of one recipe.

    Attributes:
        status: ``"measured"``; ``"refused"`` by a pass, or ``"failed"``.
        reason: of what is not measured.
        step_seconds: median time of a decode step of the workload's batch.
        prompt_seconds: of its prompts.
        tokens_per_second: new tokens of the batch over the time of prompts and steps together.
        weight_bytes: of the weights.
        cache_bytes: of keys, values and indices, at the end of the sequences, on the device.
        peak_bytes: the allocator's peak; 0 on a CPU.
        losses: nats a token, of each sequence of the text recipes are chosen by.
        confirmed: likewise of the text nobody has chosen by; empty where it was not looked at.
    """

    status: str
    reason: str = ""
    step_seconds: float = 0.0
    prompt_seconds: float = 0.0
    tokens_per_second: float = 0.0
    weight_bytes: int = 0
    cache_bytes: int = 0
    peak_bytes: int = 0
    losses: list[float] = field(default_factory=list)
    confirmed: list[float] = field(default_factory=list)

    @property
    def is_measured(self) -> bool:
        return self.status == "measured"

    def of(self, goal: Goal) -> float:
        """What the goal makes smaller."""
        if goal == "memory":
            return float(self.weight_bytes + self.cache_bytes)
        return self.step_seconds if goal == "latency" else 1 / self.tokens_per_second

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def prepared(load: Callable[[], Any], candidate: Candidate) -> Any:
    """A new model with the candidate's passes.

    Raises:
        EffpassError: a pass refuses, or finds nothing to rewrite.
    """
    from effpass import api

    model = api.prepare(load(), candidate.recipe)
    idle = [entry.name for entry in model.effpass_report.passes if not entry.hits]  # type: ignore[union-attr]
    if idle:
        raise EffpassError(f"{idle[0]} found nothing to rewrite")
    return model


def try_out(load: Callable[[], Any], candidate: Candidate, texts: Tensor, workload: Workload) -> Trial:
    """Measure a candidate; what goes wrong with it is its result."""
    try:
        return measure(prepared(load, candidate), texts, workload)
    except EffpassError as error:
        return Trial("refused", error.message)
    except Exception as error:  # one recipe's failure is no reason to end a night's search
        return Trial("failed", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(model: Any, texts: Tensor, workload: Workload) -> Trial:
    """
    Args:
        model: as `effpass.prepare` returns it.
        texts: int64 `[W, prompt + new tokens]`.
        workload: what is timed.
    """
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    groups = texts.split(_rows(model, workload))
    readings = [_read(model, group, workload) for group in groups]
    trial = Trial("measured", losses=[loss for reading in readings for loss in reading.losses])
    if len(readings) > 1 and len(readings[-1].losses) == workload.batch:
        timed = readings[-1]  # the first one warms up
    else:
        timed = _read(model, texts.repeat(-(-workload.batch // len(texts)), 1)[: workload.batch], workload)
    trial.prompt_seconds, trial.cache_bytes = timed.prompt_seconds, timed.cache_bytes
    trial.step_seconds = median(timed.step_seconds[_UNTIMED:])
    whole = trial.prompt_seconds + workload.new_tokens * trial.step_seconds
    trial.tokens_per_second = workload.batch * workload.new_tokens / whole
    trial.weight_bytes = held_bytes(list(model.state_dict().values()), device)
    if device.type == "cuda":
        trial.peak_bytes = torch.cuda.max_memory_allocated(device)
    return trial


def losses_of(model: Any, texts: Tensor, workload: Workload) -> list[float]:
    """Nats a new token, the mean of each sequence of `texts`."""
    groups = texts.split(_rows(model, workload))
    return [loss for group in groups for loss in _read(model, group, workload).losses]


def _rows(model: Any, workload: Workload) -> int:
    """Sequences that are read together."""
    return workload.batch if model.device.type == "cuda" else max(workload.batch, _ROWS)


@dataclass(frozen=True)
class _Reading:
    """What reading one group of sequences came to."""

    losses: list[float]
    prompt_seconds: float
    step_seconds: list[float]
    cache_bytes: int


@torch.inference_mode()
def _read(model: Any, texts: Tensor, workload: Workload) -> _Reading:
    device, ids, rows = model.device, texts.to(model.device), len(texts)
    steps = []
    with _session(model, rows, workload) as session:
        started = _now(device)
        chunk = max(1, inner_model(model).effpass_engine.prefill_tokens // rows)
        session.prefill(ids[:, : workload.prompt], None, chunk)
        prompt_seconds = _now(device) - started
        total = torch.zeros(rows, dtype=torch.float64, device=device)
        for at in range(workload.prompt, workload.length):
            total += nn.functional.cross_entropy(session.logits[:rows].float(), ids[:, at], reduction="none")
            session.tokens[:rows] = ids[:, at : at + 1]
            started = _now(device)
            session.step()
            steps.append(_now(device) - started)
        cache_bytes = held_bytes(session.cache, device)
    return _Reading((total / workload.new_tokens).tolist(), prompt_seconds, steps, cache_bytes)


def _session(model: Any, rows: int, workload: Workload) -> Any:
    engine = getattr(inner_model(model), "effpass_engine", None)
    if engine is None:
        raise ModelError(f"{type(model).__name__} does not run on the decode engine")
    return engine.session(rows, workload.length)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def held_bytes(root: Any, device: torch.device) -> int:
    """Bytes on `device` of the tensors that `root` refers to, each storage once."""
    storages, seen = {}, set()
    waiting = [root]
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, (nn.Module, type)):
            continue
        seen.add(id(found))
        if isinstance(found, Tensor):
            for tensor in _parts(found):
                if tensor.device == device:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
        else:
            waiting += _children(found)
    return sum(storages.values())


def _parts(tensor: Tensor) -> list[Tensor]:
    """A tensor's own, where it is made of others (quantised weights)."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _parts(getattr(tensor, name))]
    return [tensor]


def _children(found: Any) -> Iterator[Any]:
    if isinstance(found, dict):
        yield from found.values()
    elif isinstance(found, (list, tuple, set)):
        yield from found
    elif type(found).__module__.startswith(("effpass.", "transformers.cache_utils")):
        yield from vars(found).values() if hasattr(found, "__dict__") else ()
        yield from (getattr(found, name, None) for name in getattr(type(found), "__slots__", ()))
