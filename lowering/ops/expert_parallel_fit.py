"""Measurement of the link between ranks: exchanges, overhead around stages, and slowdown of experts during transfers.

The results are the constants of :mod:`effpass.lowering.ops.expert_parallel_cost`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
import torch.distributed as dist

from effpass.core.errors import EffpassError
from effpass.lowering.ops.expert_parallel_cost import STAGE_KERNELS, Link, best_kernel, exchange
from effpass.lowering.ops.expert_parallel_exchange import Ranks
from effpass.lowering.ops.moe_ffn_choice import fitted
from effpass.lowering.ops.moe_ffn_cost import Shape

__all__ = ["measure_link"]

_SMALL, _LARGE = 1 << 10, 128 << 20  # bytes that each rank sends to all ranks
_TINY = Shape(each=2, experts=8, width=512, inner=256)  # `experts` per rank
_TOKENS = 64


def measure_link(ranks: Ranks, device: torch.device, dtype: torch.dtype) -> Link:
    """Measure the link. A collective call that uses half a GiB of each device.

    Args:
        ranks: two or more ranks.
        device: CUDA device of this rank.
        dtype: dtype of the layers.

    Raises:
        EffpassError: if the device is not a CUDA device, or there is only one rank.
    """
    if device.type != "cuda" or ranks.size < 2:
        raise EffpassError(
            f"{ranks.size} ranks on {device}: there is no link to measure", hint="torchrun on two GPUs or more"
        )
    with torch.inference_mode():
        start = _exchange(ranks, device, _SMALL)
        off = _LARGE * (ranks.size - 1) / ranks.size
        rate = off / (_exchange(ranks, device, _LARGE) - start)
        link = Link(start, rate, around=1.0, stage=1.0, sharing=max(1.0, _sharing(ranks, device, dtype)))
        one, many = (_layer(ranks, device, dtype, stages) for stages in (1, _TINY.experts))
    stage = max(1e-9, (many - one) / (_TINY.experts - 1))
    pairs = _TOKENS * _TINY.each
    experts = best_kernel(pairs, _TINY.experts, _TINY, fitted(device, dtype), STAGE_KERNELS)[1]
    around = one - max(stage, 2 * exchange(_TOKENS, _TINY, link) + experts)
    return replace(link, around=max(1e-9, around), stage=stage)


def _exchange(ranks: Ranks, device: torch.device, size: int) -> float:
    """Seconds of an all-to-all in which each rank sends `size` bytes, including its own share."""
    each = size // ranks.size
    rows, into = (torch.zeros(each * ranks.size, dtype=torch.uint8, device=device) for _ in range(2))
    return _slowest(lambda: ranks.send(rows, [each] * ranks.size, into, [each] * ranks.size).wait(), device, ranks)


def _sharing(ranks: Ranks, device: torch.device, dtype: torch.dtype) -> float:
    """Factor by which matrix products slow down while rows travel all the time."""
    square = torch.randn(4096, 4096, device=device, dtype=dtype)
    each = _LARGE // ranks.size
    rows, into = (torch.zeros(each * ranks.size, dtype=torch.uint8, device=device) for _ in range(2))

    def products() -> None:
        for _ in range(4):
            square @ square

    alone = _slowest(products, device, ranks)
    travelling = max(1, round(2 * alone / _exchange(ranks, device, _LARGE)))

    def both() -> None:
        going = [ranks.send(rows, [each] * ranks.size, into, [each] * ranks.size) for _ in range(travelling)]
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        products()
        end.record()
        for exchanged in going:
            exchanged.wait()
        torch.cuda.synchronize(device)
        taken.append(begin.elapsed_time(end) / 1e3)

    taken: list[float] = []
    _slowest(both, device, ranks)
    return _most(median(taken), device, ranks) / alone


def _layer(ranks: Ranks, device: torch.device, dtype: torch.dtype, stages: int) -> float:
    """Seconds of a layer with almost nothing to compute or to send."""
    import effpass.lowering.ops.expert_parallel  # noqa: F401  (registers the operator)

    tiny, every = _TINY, _TINY.experts * ranks.size
    gate_up = torch.zeros(tiny.experts, 2 * tiny.inner, tiny.width, device=device, dtype=dtype)
    down = torch.zeros(tiny.experts, tiny.width, tiny.inner, device=device, dtype=dtype)
    x = torch.zeros(_TOKENS, tiny.width, device=device, dtype=dtype)
    ids = torch.rand(_TOKENS, every, device=device).topk(tiny.each).indices
    weights = torch.ones(_TOKENS, tiny.each, device=device)
    return _slowest(
        lambda: torch.ops.effpass.expert_parallel(
            x, ids, weights, gate_up, None, down, None, "silu", 1.0, 0.0, 0.0, False, False, stages, ranks.name
        ),
        device,
        ranks,
    )


def _slowest(run: Callable[[], object], device: torch.device, ranks: Ranks, runs: int = 15) -> float:
    """Median seconds of `run` on the slowest rank, after warm-up."""
    taken = []
    for turn in range(runs + 5):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        if turn >= 5:
            taken.append(time.perf_counter() - started)
    return _most(median(taken), device, ranks)


def _most(value: float, device: torch.device, ranks: Ranks) -> float:
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=ranks.group)
    return float(found)
