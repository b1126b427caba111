"""Predicts how long a program takes on a device, from the costs of its kernels and measured ceilings of the device.

    t(program) = Σ over kernels k of  latency[k] + max(flops(k) / peak[k], bytes(k) / bandwidth[k])
    bound      = max(Σ flops(k) / peak[k], bytes of weights and cache / bandwidth)

A kernel k of :mod:`effpass.core.kernels` is a matrix product, an attention, fused operators, or another operator.
`latency` is the time of one small kernel of its kind in a chain of dependent ones (in a CUDA graph on a GPU): launch,
ramp-up and memory latency. `peak` and `bandwidth` are what a large kernel of its kind attains; a matrix-vector product
reads at less than the bandwidth of a plain read. All are measured once per device and dtype, which takes seconds, and
cached on disk.

The prediction does not account for hits in caches between kernels, kernels that run concurrently, work of the host (a
call without CUDA graphs, checks before it), and how well a library kernel fits a shape.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from effpass.core.errors import EffpassError, did_you_mean
from effpass.core.flops import evaluate
from effpass.core.gguf import cache_dir
from effpass.core.kernels import Kernel
from effpass.core.whole import write_text

__all__ = ["KNOWN", "Ceilings", "bound", "ceilings", "device_and_dtype", "device_name", "known", "measure", "predict"]

log = logging.getLogger("effpass")

Sizes: TypeAlias = "Mapping[Any, int] | None"
Some = Callable[..., torch.Tensor]
# One step of a chain of kernels, which maps a tensor to one of the same shape, and the first input.
Step = tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Ceilings:
    """Attainable throughputs and latencies of a device for one dtype.

    Attributes:
        device: name of the device; for a CPU, with its number of threads.
        dtype: dtype of the matrix products.
        torch: version of torch that they were measured with.
        peak: FLOP/s of a large square matrix product.
        attention_peak: FLOP/s of attention over a long prompt with a mask.
        bandwidth: bytes/s of a read-only kernel over a large buffer.
        matvec_bandwidth: bytes/s of a matrix-vector product with a matrix larger than any cache.
        latency: kind of kernel → seconds of one small kernel in a chain.
    """

    device: str
    dtype: str
    torch: str
    peak: float
    attention_peak: float
    bandwidth: float
    matvec_bandwidth: float
    latency: dict[str, float]

    def peak_of(self, kernel: Kernel) -> float:
        return self.attention_peak if kernel.kind == "attention" else self.peak


def predict(kernel: Kernel, at: Ceilings, sizes: Sizes = None) -> float:
    """Predicted seconds of one kernel, with its symbols replaced by `sizes`."""
    flops, moved = evaluate(kernel.flops, sizes or {}), evaluate(kernel.bytes, sizes or {})
    bandwidth = at.matvec_bandwidth if kernel.kind == "matmul" else at.bandwidth
    return at.latency[kernel.kind] + max(flops / at.peak_of(kernel), moved / bandwidth)


def bound(kernels: Sequence[Kernel], at: Ceilings, sizes: Sizes = None) -> float:
    """Lower bound in seconds for any schedule of `kernels`: all FLOPs at peak, and weights and caches read once."""
    computing = sum(evaluate(k.flops, sizes or {}) / at.peak_of(k) for k in kernels)
    needed = sum(evaluate(k.weights + k.cache, sizes or {}) for k in kernels)
    return max(computing, needed / at.bandwidth)


def known(name: str) -> Ceilings:
    """Ceilings that were measured beforehand, for predictions about a device that is not present.

    Raises:
        EffpassError: no ceilings are stored for `name`.
    """
    if name not in KNOWN:
        raise EffpassError(
            f"no ceilings are known for {name!r}{did_you_mean(name, KNOWN)}",
            hint="leave the option out to measure the device that the model is on",
        )
    return KNOWN[name]


def ceilings(device: torch.device | str, dtype: torch.dtype) -> Ceilings:
    """The ceilings of `device`, read from the cache on disk, or else measured in seconds and cached.

    If the cache file can't be read or has another format, the ceilings are measured again.
    """
    device = torch.device(device)
    name, kind = device_name(device), str(dtype).removeprefix("torch.")
    key = sha256("\n".join((name, kind, torch.__version__)).encode()).hexdigest()[:16]
    file = cache_dir() / "ceilings" / f"{key}.json"
    cached = _read(file)
    if cached is not None and (cached.device, cached.dtype, cached.torch) == (name, kind, torch.__version__):
        return cached
    measured = measure(device, dtype)
    _write(file, measured)
    return measured


def device_and_dtype(model: torch.nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and floating-point dtype of most of the model's weights, by number of elements.

    Raises:
        EffpassError: the model has no floating-point weights.
    """
    counts: Counter[tuple[torch.device, torch.dtype]] = Counter()
    for weight in model.parameters():
        if weight.is_floating_point():
            counts[weight.device, weight.dtype] += weight.numel()
    if not counts:
        raise EffpassError(f"{type(model).__name__} has no floating-point weights to predict the time of")
    return counts.most_common(1)[0][0]


def _read(file: Path) -> Ceilings | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        result = Ceilings(**found)
        rates = (result.peak, result.attention_peak, result.bandwidth, result.matvec_bandwidth)
        numbers = [*rates, *result.latency.values()]
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    if set(result.latency) != set(_LATENCIES) or not all(isinstance(x, (int, float)) and x > 0 for x in numbers):
        return None
    return result


def _write(file: Path, measured: Ceilings) -> None:
    """Write the cache file atomically; if it can't be written, the next process measures again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(asdict(measured), indent=2))
    except OSError as error:
        log.warning("the measured ceilings can't be kept in %s: %s", file.parent, error.strerror)


def device_name(device: torch.device) -> str:
    """Name of the device according to the driver or the system; for a CPU, with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


# -- measuring ------------------------------------------------------------------------------------------------------


def measure(device: torch.device | str, dtype: torch.dtype) -> Ceilings:
    """Measure `device`, which takes a few seconds and up to 2 GiB of its memory (256 MiB on a CPU).

    Raises:
        EffpassError: `device` is neither a CPU nor a CUDA device.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise EffpassError(f"a {device.type} device can't be measured", hint="use a CPU or CUDA device")

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    with torch.inference_mode():
        measured = Ceilings(
            device_name(device),
            str(dtype).removeprefix("torch."),
            torch.__version__,
            _peak(some, device),
            _attention_peak(some, device),
            _bandwidth(device),
            _matvec_bandwidth(some, device),
            {kind: _per_step(make(some, device), device) for kind, make in _LATENCIES.items()},
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return measured


def _peak(some: Some, device: torch.device) -> float:
    side = 8192 if device.type == "cuda" else 1024
    square = some(side, side)
    return 2 * side**3 / _seconds(lambda: square @ square, device)


def _attention_peak(some: Some, device: torch.device) -> float:
    heads, tokens = (16, 4096) if device.type == "cuda" else (8, 512)
    x, mask = some(1, heads, tokens, 64), torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device).tril()
    return 4 * heads * tokens**2 * 64 / _seconds(lambda: F.scaled_dot_product_attention(x, x, x, mask), device)


def _bandwidth(device: torch.device) -> float:
    buffer = torch.ones((2**31 if device.type == "cuda" else 2**28) // 4, device=device)
    return buffer.numel() * 4 / _seconds(lambda: buffer.sum(), device)


def _matvec_bandwidth(some: Some, device: torch.device) -> float:
    side = 16384 if device.type == "cuda" else 8192
    matrix, vector = some(side, side), some(1, side)
    return matrix.numel() * matrix.element_size() / _seconds(lambda: F.linear(vector, matrix), device)


def _matmul(some: Some, device: torch.device) -> Step:
    """The product of one vector and a matrix that is small enough to stay in a cache."""
    side = 512 if device.type == "cuda" else 64
    weight = some(side, side) * side**-0.5
    return lambda x: F.linear(x, weight), some(1, side)


def _attention(some: Some, device: torch.device) -> Step:
    """Attention of one query with a mask, as in a decode step over a static cache."""
    key, value, mask = some(1, 1, 64, 64), some(1, 1, 64, 64), torch.ones(1, 1, 1, 64, device=device).bool()
    return lambda query: F.scaled_dot_product_attention(query, key, value, mask), some(1, 1, 1, 64)


def _norm(some: Some, device: torch.device) -> Step:
    """Normalization of one vector, which most fused kernels of a language model contain."""
    return lambda x: F.layer_norm(x, (512,)), some(1, 512)


def _sort(some: Some, device: torch.device) -> Step:
    return lambda x: torch.sort(x).values, some(1, 64)


_LATENCIES: dict[str, Callable[[Some, torch.device], Step]] = {
    "matmul": _matmul,
    "attention": _attention,
    "fused": _norm,
    "other": _sort,
}


def _per_step(step: Step, device: torch.device, steps: int = 100) -> float:
    """Seconds per step of a chain; on a GPU the chain is one CUDA graph."""
    function, start = step

    def chain() -> torch.Tensor:
        x = start
        for _ in range(steps):
            x = function(x)
        return x

    if device.type != "cuda":
        return _seconds(chain, device) / steps
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        chain()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    return _seconds(graph.replay, device) / steps


def _seconds(run: Callable[[], Any], device: torch.device, runs: int = 7) -> float:
    """The shortest of `runs` runs after two warm-up runs, since ceilings are what the device can attain."""
    shortest = float("inf")
    for attempt in range(runs + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if attempt >= 2:
            shortest = min(shortest, time.perf_counter() - started)
    return shortest


#: Measured by :func:`measure`, except `attention_peak`: that of cuDNN with a mask, 9 heads of size 64, 2048 tokens.
KNOWN: dict[str, Ceilings] = {
    "h100": Ceilings(
        device="NVIDIA H100 80GB HBM3",
        dtype="bfloat16",
        torch="2.11.0+cu130",
        peak=775e12,
        attention_peak=144e12,
        bandwidth=3.02e12,
        matvec_bandwidth=2.56e12,
        latency={"matmul": 3.16e-6, "attention": 6.70e-6, "fused": 2.43e-6, "other": 7.62e-6},
    )
}
