"""Benchmarks that share a GPU: the others are stopped while one of them times something.

:mod:`benchmarks.lanes` starts them. The environment variable EFFPASS_LANE names a folder for their GPU, in which each
has a file with the number of its process group. Without the variable, nothing is shared and nothing is stopped.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["LANE", "alone", "go_on", "nothing_timed"]

LANE = "EFFPASS_LANE"
_LOCK = "lock"
_QUIET, _UNDISTURBED, _PATIENCE = 60, 2e-4, 4.0  # kernels in a row, seconds each, seconds until they are given up
_inside = False


@contextmanager
def alone() -> Iterator[None]:
    """Stop the other process groups of the lane, wait until the GPU has done what they queued, and let them go on
    afterwards."""
    global _inside
    if _inside or LANE not in os.environ:
        yield
        return
    folder = Path(os.environ[LANE])
    with open(folder / _LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _inside = True
        try:
            _signal(folder, signal.SIGSTOP)
            time.sleep(0.05)
            _wait_until_quiet()
            yield
        finally:
            _signal(folder, signal.SIGCONT)
            _inside = False
    time.sleep(0.05)  # a process that was stopped while it waited for the lock gets it first


@contextmanager
def nothing_timed(folder: Path) -> Iterator[None]:
    """Wait until no group of a lane is timing, and let none begin to: for one that starts."""
    with open(folder / _LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def go_on(folder: Path) -> None:
    """Let all groups of a lane go on, unless one of them is timing: one that ended may have left the others stopped."""
    with open(folder / _LOCK, "w") as lock, suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _signal(folder, signal.SIGCONT)


def _signal(folder: Path, number: signal.Signals) -> None:
    for file in folder.iterdir():
        if file.name.isdecimal() and int(file.name) != os.getpgid(0):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(int(file.name), number)


def _wait_until_quiet() -> None:
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    x, quiet, until = torch.zeros(1, device="cuda"), 0, time.perf_counter() + _PATIENCE
    torch.cuda.synchronize()
    while quiet < _QUIET and time.perf_counter() < until:
        began = time.perf_counter()
        x.add_(1)
        torch.cuda.synchronize()
        quiet = quiet + 1 if time.perf_counter() - began < _UNDISTURBED else 0
        time.sleep(1e-3)
    if quiet < _QUIET:
        print(f"{__name__}: after {_PATIENCE:g} s, the GPU still computes for others", flush=True)
