"""Processes of area `balance` that really wait for each other: what they take, and what the simulator says of them.

    python -m benchmarks.balance_real FOLDER SMOKE      with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set

Each of 4 processes has a core of its own and computes its micro-batches: of every document
and layer the products of attention with its budget and of a feed-forward, forward and backward. Ranks meet behind each
micro-step, by gloo. The table is measured in the same processes, all at once.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.balance_lengths import EXPONENT, coverage
from benchmarks.rows import Row, row
from effpass.trainers.balance.simulator import Layout, Step, play
from effpass.trainers.balance.table import LatencyTable
from effpass.trainers.balance.tuning import Tuning, slowest

__all__ = ["real"]

WORLD = 4
LAYERS, HEADS, SIZE, WIDTH = 2, 2, 32, 128
BUDGETS = (256, 384, 512, 768, 1024, 1536)
TUNING = Tuning(BUDGETS, 768)
CHUNK = 256
WAYS = {
    "random batches, fixed budget": ("random", "none"),
    "batches by length, fixed budget": ("length", "none"),
    "batches by seconds, fixed budget": ("seconds", "none"),
    "random batches, tuned budgets": ("random", "both"),
    "batches by seconds, tuned budgets": ("seconds", "both"),
}


def real(device: str, smoke: bool) -> Iterator[Row]:
    """Rows of 4 processes on this machine's CPU, whatever `device` is."""
    cores = len(os.sched_getaffinity(0))
    if cores < WORLD:  # a process that waits would lend its core to those it waits for
        print(f"skipped: {WORLD} processes need a core each, and there are {cores}")
        return
    with tempfile.TemporaryDirectory() as folder:
        _start(Path(folder), smoke)
        found = json.loads((Path(folder) / "found.json").read_text())
    base = found["random batches, fixed budget"]
    place = f"{WORLD} processes, {cores} cores" + (
        "" if cores >= WORLD else ": they share cores, and the table knows it"
    )
    case = f"{place}; lengths 256 to 3072, 16 samples a step in 2 micro-steps"
    for name, (seconds, simulated, runs) in found.items():
        common: dict[str, Any] = {"device": "cpu", "runs": runs}
        if found[name] is not base:
            yield row(
                AREA, case, f"measured step, {name}", seconds * 1e3, "ms", peer=base[0] * 1e3,
                peer_name="random batches, fixed budget", note=f"simulated {base[1] / simulated:.3f} times as fast",
                **common,
            )  # fmt: skip
        yield row(
            AREA, case, f"simulated over measured time, {name}", simulated / seconds * 100, "%",
            note=f"simulated {simulated * 1e3:.0f} ms, measured {seconds * 1e3:.0f} ms; coverage assumed as"
            f" (k/s)^{EXPONENT}", **common,
        )  # fmt: skip


AREA = "balance"


def _start(folder: Path, smoke: bool) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD)}
    common |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.balance_real", str(folder), str(int(smoke))]
    processes = [subprocess.Popen(command, env={**common, "RANK": str(rank)}) for rank in range(WORLD)]
    try:
        returned = [process.wait(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(returned):
        raise RuntimeError(f"the processes returned {returned}")


# -- in a process -----------------------------------------------------------------------------------------------------


def attention(length: int, budget: int) -> None:
    """Forward and backward of a document in one layer: each chunk of queries with as many keys as it may have."""
    q, k, v = (_tensor(HEADS, length, SIZE).requires_grad_() for _ in range(3))
    parts = []
    for begin in range(0, length, CHUNK):
        end = min(begin + CHUNK, length)
        keys = slice(max(0, end - max(budget, CHUNK)), end)
        weights = (q[:, begin:end] @ k[:, keys].transpose(1, 2)).softmax(-1)
        parts.append(weights @ v[:, keys])
    torch.cat(parts, 1).sum().backward()


def others(tokens: int) -> None:
    """Forward and backward of all else in all layers."""
    x = _tensor(1, tokens, WIDTH).requires_grad_()
    for _ in range(LAYERS):
        up, down = _tensor(WIDTH, 2 * WIDTH).requires_grad_(), _tensor(2 * WIDTH, WIDTH).requires_grad_()
        ((x @ up).relu() @ down).sum().backward()


def _tensor(*shape: int) -> torch.Tensor:
    return torch.full(shape, 0.01)


def _timed(run: Any, *arguments: int, runs: int = 5) -> float:
    """Median over calls and ranks, all at it."""
    taken = []
    for attempt in range(runs + 1):
        dist.barrier()
        started = time.perf_counter()
        run(*arguments)
        if attempt:
            taken.append(time.perf_counter() - started)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, median(taken))
    return float(np.mean(every))


def _measured() -> LatencyTable:
    lengths, tokens = (256, 384, 512, 768, 1024, 1536, 2048, 2560, 3072), (512, 1024, 2048, 4096, 8192)
    times = tuple(tuple(_timed(attention, s, min(k, s)) for k in BUDGETS) for s in lengths)
    rest = tuple(_timed(others, count) for count in tokens)
    return LatencyTable(
        "measured", "cpu", "float32", torch.__version__, "", LAYERS, lengths, BUDGETS, times, tokens, rest
    )


def _step(step: Step, rank: int) -> float:
    dist.barrier()
    started = time.perf_counter()
    for micro, budget in zip(step.shares[rank], step.budgets[rank], strict=True):
        for _ in range(LAYERS):
            for sample in micro:
                length = int(step.lengths[sample])
                attention(length, min(int(budget), length))
        others(int(step.lengths[micro].sum()))
        dist.barrier()
    return time.perf_counter() - started


def main(folder: Path, smoke: bool) -> None:
    torch.set_num_threads(1)
    cores, rank = sorted(os.sched_getaffinity(0)), int(os.environ["RANK"])
    os.sched_setaffinity(0, {cores[rank]})
    dist.init_process_group("gloo")
    table = _measured()
    rng = np.random.default_rng(0)
    lengths = np.where(rng.random(512) < 0.5, rng.integers(256, 512, 512), rng.integers(1024, 3073, 512))
    layout = Layout(WORLD, 2, 2, 2 * int(lengths.max()))
    found = {}
    plans = {
        name: list(play(table, lengths, layout, replace(TUNING, direction=direction), coverage, batching,  # type: ignore[arg-type]
                        steps=2 if smoke else 8))
        for name, (batching, direction) in WAYS.items()
    }  # fmt: skip
    taken: dict[str, list[float]] = {name: [] for name in plans}
    _step(next(iter(plans.values()))[0], rank)  # a first one, which does not count
    for number in range(len(next(iter(plans.values())))):  # in turn, so that a drift of the machine meets all alike
        for name, steps in plans.items():
            taken[name].append(_step(steps[number], rank))
    for name, steps in plans.items():
        simulated = float(np.mean([slowest(step.seconds, TUNING.waits) for step in steps]))
        found[name] = (float(np.mean(taken[name])), simulated, len(steps))
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "1")
