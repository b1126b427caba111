"""Fit of the cost model of expert kernels to a device, by timing each kernel on three layers with growing loads.

Routings are random and change between calls, so that no cache holds the experts of the next call. Kernels that do not
wait for the device are timed in a CUDA graph, as in decoding. `effpass calibrate moe` calls :func:`measure`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from effpass.core.errors import EffpassError
from effpass.core.roofline import device_name
from effpass.lowering.ops.moe_ffn_choice import DEFAULT, available, run_kernel
from effpass.lowering.ops.moe_ffn_cost import KERNELS, Constants, Fit, Shape, fit, predict

__all__ = ["LAYERS", "measure", "random_layer", "routings", "seconds_a_call"]

#: Layers with many small experts, with few large ones, and with experts much narrower than the hidden size.
LAYERS = (Shape(8, 128, 2048, 768), Shape(2, 8, 4096, 7168), Shape(6, 40, 5120, 1536))
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
_CALLS = 4  # calls per graph, each with its own routing
_SLOWEST = 12e-3  # seconds; a kernel is not timed where it is predicted to take longer


def measure(device: torch.device, dtype: torch.dtype, say: Callable[[str], None]) -> tuple[Fit, dict[str, float]]:
    """Fit every kernel to `device`; takes about a minute and 4 GiB of device memory.

    Args:
        device: a CUDA device.
        dtype: dtype of the layers; only bfloat16 is supported by all kernels.
        say: callback that receives a line of text on the fit of each kernel.

    Returns:
        The fit with its timings, and for each kernel the root mean square of its relative differences to the timings.

    Raises:
        EffpassError: if the device is not a CUDA device, or Triton is not installed.
    """
    if device.type != "cuda":
        raise EffpassError(f"kernels of experts run on a CUDA device, and this is {device}", hint="run it on a GPU")
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    timings: dict[str, list[tuple[int, Shape, float]]] = {}
    with torch.inference_mode():
        for shape in LAYERS:
            gate_up, down = random_layer(shape, device, dtype)
            x = torch.randn(max(_TOKENS), shape.width, device=device, dtype=dtype)
            names = available(x, gate_up, down)
            if not names:
                raise EffpassError("no kernel of experts is here", hint="pip install triton")
            for tokens in _TOKENS:
                ids, weights = routings(shape, tokens, _CALLS, device)
                for name in names:
                    if predict(name, tokens, shape, _start(name), multiprocessors) > _SLOWEST:
                        continue

                    tensors = (x[:tokens], ids, weights, gate_up, down)
                    taken = seconds_a_call(_call(name, *tensors), _CALLS, captured=name != "by_expert")
                    timings.setdefault(name, []).append((tokens, shape, taken))
            del gate_up, down, x, tensors
            torch.cuda.empty_cache()
    kernels, errors = {}, {}
    for name in KERNELS:
        start = _start(name)
        kernels[name] = fit(name, timings[name], multiprocessors, start) if name in timings else start
        squares = [
            (predict(name, n, s, kernels[name], multiprocessors) / t - 1) ** 2 for n, s, t in timings.get(name, ())
        ]
        errors[name] = math.sqrt(sum(squares) / len(squares)) if squares else math.nan
        say(f"{name}: {len(squares)} timings, {errors[name]:.1%} off, {kernels[name]}")
    kind = str(dtype).removeprefix("torch.")
    return Fit(device_name(device), kind, torch.__version__, multiprocessors, kernels, timings), errors


def _start(name: str) -> Constants:
    """Return the constants from which a kernel's are fitted."""
    return DEFAULT.kernels.get(name, DEFAULT.kernels["grouped64"])


def _call(name: str, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Callable[[int], Tensor]:
    gate = ("silu", 1.0, 0.0, 0.0, False)
    return lambda turn: run_kernel(name, x, ids[turn], weights, gate_up, None, down, None, *gate)


def random_layer(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return random `gate_up` and `down` of a layer."""
    gate_up = torch.randn(shape.experts, 2 * shape.inner, shape.width, device=device, dtype=dtype)
    down = torch.randn(shape.experts, shape.width, shape.inner, device=device, dtype=dtype)
    return gate_up.mul_(shape.width**-0.5), down.mul_(shape.inner**-0.5)


def routings(shape: Shape, tokens: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `count` random routings int64 [count, T, k] over equally likely experts, and weights float32 [T, k]."""
    scores = torch.rand(count, tokens, shape.experts, device=device)
    weights = torch.rand(tokens, shape.each, device=device).softmax(-1)
    return scores.topk(shape.each, dim=-1).indices, weights


def seconds_a_call(call: Callable[[int], object], calls: int, *, captured: bool, runs: int = 7) -> float:
    """Median seconds of ``call(turn)`` over `runs` rounds of `calls` turns, in one CUDA graph if `captured`."""

    def all_turns() -> None:
        for turn in range(calls):
            call(turn)

    run: Callable[[], object] = all_turns
    all_turns()
    if captured:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_turns()
        run = graph.replay
    run()
    taken = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3 / calls)
    return median(taken)
