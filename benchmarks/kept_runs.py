"""Many runs of a study: side by side, none begun too late, and kept, so that what has ended is not run again.

EFFPASS_RUNS       file of finished runs, a line each
EFFPASS_LANES      processes side by side, each on the next GPU (default 1)
EFFPASS_SECONDS    after the start of the process, when no run begins any more
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

__all__ = ["results"]

R = TypeVar("R")  # dataclasses: what is run
F = TypeVar("F")  # and what it came to

_STARTED = time.time()
_found: dict[str, Any] = {}


def results(
    runs: Sequence[R], compute: Callable[[R], F], read: Callable[[dict[str, Any]], F], device: str
) -> list[F | None]:
    """Of each run; None where the time is over.

    Args:
        runs: each once.
        compute: one of them; a function of a module, since other processes call it.
        read: what was found, from a line of the file.
        device: that lanes share out.
    """
    path = Path(os.environ.get("EFFPASS_RUNS", ""))
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    _found.update({json.dumps(line["run"]): read(line["found"]) for line in lines})
    missing = [run for run in dict.fromkeys(runs) if _key(run) not in _found]
    lanes = int(os.environ.get("EFFPASS_LANES", "1"))
    deadline = _STARTED + float(os.environ.get("EFFPASS_SECONDS", "inf"))
    one = partial(_one, compute, deadline)
    found = list(_pool(lanes, device).map(one, missing)) if lanes > 1 and missing else list(map(one, missing))
    _found.update({_key(run): value for run, value in zip(missing, found, strict=True) if value is not None})
    return [_found.get(_key(run)) for run in runs]


def _one(compute: Callable[[R], F], deadline: float, run: R) -> F | None:
    if time.time() > deadline:
        return None
    found = compute(run)
    if path := os.environ.get("EFFPASS_RUNS"):
        with Path(path).open("a") as file:  # one write a line: lanes share the file
            file.write(json.dumps({"run": asdict(run), "found": asdict(found)}) + "\n")  # type: ignore[call-overload]
    return found


def _key(run: Any) -> str:
    return json.dumps(json.loads(json.dumps(asdict(run))))


@cache
def _pool(lanes: int, device: str) -> ProcessPoolExecutor:
    """Processes that stay for the next sweep, with the models and data that they have read."""
    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(lanes):
        numbers.put(number)
    return ProcessPoolExecutor(lanes, context, _take_device, (device, numbers))


def _take_device(device: str, numbers: Any) -> None:
    """A process of a lane sees the next GPU alone: a Trainer takes the first that it sees."""
    number = numbers.get()
    if device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
