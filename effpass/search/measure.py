"""Measurement of one recipe: time of a decode step and of prefill, memory, and the loss on a text.

The tokens of the text are fed one at a time through the decode engine, as in generation, so that the loss includes the
effect of passes that evict tokens from the KV cache or do not read all of it. The first token is predicted from the
prompt.
"""

from __future__ import annotations

import gc
import math
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

_UNTIMED = 2  # warm-up steps of a session
_ROWS = 8  # smallest batch for computing losses on a CPU


@dataclass
class Trial:
    """Result of one recipe.

    Attributes:
        status: ``"measured"``, ``"refused"`` (by a pass) or ``"failed"``.
        reason: why the recipe was refused or failed; empty when it was measured.
        step_seconds: median time of a decode step of the workload's batch.
        prompt_seconds: time of the prefill of the batch.
        tokens_per_second: new tokens of the batch divided by the time of prefill and decode steps together.
        weight_bytes: bytes of the weights on the device.
        cache_bytes: bytes of keys, values and indices on the device, at the end of the sequences.
        peak_bytes: peak of the allocator; 0 on a CPU.
        losses: mean loss in nats per token of each sequence of the selection text, by which recipes are chosen.
        confirmed: the same for the confirmation text, which is not used to choose; empty if not measured yet.
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
        """The quantity that `goal` minimizes: bytes, seconds per step, or seconds per token."""
        if goal == "memory":
            return float(self.weight_bytes + self.cache_bytes)
        return self.step_seconds if goal == "latency" else 1 / self.tokens_per_second

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def prepared(load: Callable[[], Any], candidate: Candidate) -> Any:
    """Load a new model and apply the candidate's passes to it.

    Raises:
        EffpassError: a pass refuses the model, or finds nothing to rewrite.
    """
    from effpass import api

    model = api.prepare(load(), candidate.recipe)
    idle = [entry.name for entry in model.effpass_report.passes if not entry.hits]  # type: ignore[union-attr]
    if idle:
        raise EffpassError(f"{idle[0]} found nothing to rewrite")
    return model


def try_out(load: Callable[[], Any], candidate: Candidate, texts: Tensor, workload: Workload) -> Trial:
    """Load and measure a candidate; an error becomes its result instead of being raised."""
    try:
        return measure(prepared(load, candidate), texts, workload)
    except EffpassError as error:
        return Trial("refused", error.message)
    except Exception as error:  # the failure of one recipe must not end the search
        return Trial("failed", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(model: Any, texts: Tensor, workload: Workload) -> Trial:
    """Measure time, memory and loss of a prepared model.

    Args:
        model: model returned by :func:`effpass.prepare`.
        texts: token ids of the selection text, int64 `[W, prompt + new_tokens]`.
        workload: sizes of the requests.
    """
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    groups = texts.split(_rows(model, workload))
    readings = [_read(model, group, workload) for group in groups]
    trial = Trial("measured", losses=[loss for reading in readings for loss in reading.losses])
    if not all(map(math.isfinite, trial.losses)):
        return Trial("failed", "its losses are not finite")
    if len(readings) > 1 and len(readings[-1].losses) == workload.batch:
        timed = readings[-1]  # the groups before it were the warm-up
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
    """Mean loss of each sequence of `texts`, in nats per new token."""
    groups = texts.split(_rows(model, workload))
    return [loss for group in groups for loss in _read(model, group, workload).losses]


def _rows(model: Any, workload: Workload) -> int:
    """Batch size for computing losses."""
    return workload.batch if model.device.type == "cuda" else max(workload.batch, _ROWS)


@dataclass(frozen=True)
class _Reading:
    """Measurements of one batch of sequences."""

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
    """Bytes on `device` of all tensors reachable from `root`, without modules; each storage is counted once."""
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
    """The tensors that a tensor subclass (quantized weights) consists of; an ordinary tensor itself."""
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
