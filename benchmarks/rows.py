"""Rows: one figure each, ours and the peer's, taken in the same run under the same conditions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.alone import alone

__all__ = ["Row", "Timing", "bandwidth", "measure", "measure_pair", "seconds_a_call", "sync", "write"]


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        area: benchmark area.
        case: what was run: model shape, batch, length.
        metric: what was measured.
        ours: effpass's figure.
        peer: the peer's figure; None where a figure has no peer.
        peer_name: who that is.
        ratio: above 1 means effpass is ahead; None without a peer.
        bound: the figure that the hardware allows, from ceilings measured in this run; None where not modeled.
        unit: unit of `ours`, `peer` and `bound`.
        runs: how many timed repetitions the medians rest on.
        device: as the driver names it.
        versions: of Python and the packages that matter.
        commit: of effpass.
        note: conditions that the reader must know.
    """

    area: str
    case: str
    metric: str
    ours: float
    peer: float | None
    peer_name: str
    ratio: float | None
    bound: float | None
    unit: str
    runs: int
    device: str
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    note: str = ""


def row(
    area: str,
    case: str,
    metric: str,
    ours: float,
    unit: str,
    *,
    device: str,
    peer: float | None = None,
    peer_name: str = "",
    lower_is_better: bool = True,
    bound: float | None = None,
    runs: int = 1,
    note: str = "",
) -> Row:
    """A row with ratio, device name, versions and commit filled in."""
    ratio = None
    if peer is not None and ours > 0 and peer > 0:
        ratio = peer / ours if lower_is_better else ours / peer
    numbers = [None if x is None else float(f"{x:.5g}") for x in (ours, peer, ratio, bound)]
    return Row(
        area, case, metric, numbers[0], numbers[1], peer_name, numbers[2], numbers[3], unit, runs,  # type: ignore[arg-type]
        device_name(device), _versions(), _commit(), note,
    )  # fmt: skip


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [n for n in Path("/proc/cpuinfo").read_text().splitlines() if n.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return f"{cpu}, {torch.get_num_threads()} threads"


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "peft", "onnxruntime"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def _commit() -> str:
    here = Path(__file__).parent
    marked = here.parent / ".commit"  # a copy of the tree without its history
    if marked.exists():
        return marked.read_text().strip()
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, and the spread over repetitions."""

    median: float
    low: float
    high: float
    runs: int


def measure(fn: Callable[[], Any], device: str, *, warmup: int = 3, runs: int = 20, inner: int = 1) -> Timing:
    """Time ``fn()`` after `warmup` calls; `inner` calls make one repetition."""
    return measure_pair(fn, None, device, warmup=warmup, runs=runs, inner=inner)[0]


def measure_pair(
    ours: Callable[[], Any],
    peer: Callable[[], Any] | None,
    device: str,
    *,
    warmup: int = 3,
    runs: int = 20,
    inner: int = 1,
) -> tuple[Timing, Timing]:
    """Time two functions in turn, so that a drift of the machine meets both alike, with no other benchmark."""
    with alone():
        return _measured_pair(ours, peer, device, warmup, runs, inner)


def _measured_pair(
    ours: Callable[[], Any], peer: Callable[[], Any] | None, device: str, warmup: int, runs: int, inner: int
) -> tuple[Timing, Timing]:
    functions = [f for f in (ours, peer) if f is not None]
    for f in functions:
        for _ in range(warmup):
            f()
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(runs):
        for f, out in zip(functions, seconds, strict=True):
            sync(device)
            started = time.perf_counter()
            for _ in range(inner):
                f()
            sync(device)
            out.append((time.perf_counter() - started) / inner)
    timings = [Timing(median(s), min(s), max(s), runs) for s in seconds]
    return timings[0], timings[-1]


def seconds_a_call(call: Callable[[int], object], calls: int, *, captured: bool, runs: int = 7) -> float:
    """As in :mod:`effpass.lowering.ops.moe_ffn_fit`, with no other benchmark on the GPU."""
    from effpass.lowering.ops import moe_ffn_fit

    with alone():
        return moe_ffn_fit.seconds_a_call(call, calls, captured=captured, runs=runs)


def sync(device: str) -> None:
    """Wait for what the device has been given to do."""
    if device == "cuda":
        torch.cuda.synchronize()


@cache
def bandwidth(device: str) -> float:
    """Bytes per second that the fastest read of a large buffer reaches in this run (2 GiB, or 256 MiB on a CPU).

    On a GPU, reads are a sum, a maximum and :func:`benchmarks.read_kernel.read`, and each counts with the median of
    several runs of ten calls in a row, in which the time to start one is hidden. On a CPU, it is the fastest of sums.
    """
    count = (2**31 if device == "cuda" else 2**28) // 4
    buffer = torch.ones(count, device=device)
    if device != "cuda":
        return count * 4 / measure(lambda: buffer.sum(), device, warmup=2, runs=7).low
    reads: list[Callable[[], Any]] = [lambda: buffer.sum(), lambda: buffer.amax()]
    if importlib.util.find_spec("triton") is not None:
        from benchmarks.read_kernel import BLOCK, read

        largest = torch.empty(count // BLOCK, device=device)
        reads.append(lambda: read(buffer, largest))
    return count * 4 / min(measure(r, device, warmup=3, runs=7, inner=10).median for r in reads)


def write(row: Row, path: Path | None) -> None:
    """Print a row and append it to a JSON-lines file."""
    peer = "" if row.peer is None else f"  {row.peer_name} {row.peer:g}"
    ratio = "" if row.ratio is None else f"  ratio {row.ratio:.3f}"
    bound = "" if row.bound is None else f"  bound {row.bound:g}"
    print(f"{row.area} | {row.case} | {row.metric}: {row.ours:g} {row.unit}{peer}{ratio}{bound}", flush=True)
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
