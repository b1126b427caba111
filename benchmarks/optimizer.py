"""Area `optimizer`: one step of MONA over the hidden matrices of a model, in turn with other optimizers.

gram-newton-schulz and dion take part where they can be imported. pip finds no distribution of dion: its authors publish
it as a source repository alone (github.com/microsoft/dion), to be installed from a checkout.

Parameters and gradients are bfloat16 and shared by all; states are each optimizer's own defaults. The bound is the
floating-point work of the Newton-Schulz form that we use, each symmetric product counted once, at the rate of a large
bfloat16 product measured in the same run.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

from benchmarks.rows import Row, measure, row, sync

AREA = "optimizer"

# (rows, columns): how many in one layer; layers.
SETS: dict[str, tuple[dict[tuple[int, int], int], int]] = {
    "822m": ({(2048, 2048): 4, (5632, 2048): 2, (2048, 5632): 1}, 16),
    "smollm2": ({(576, 576): 2, (192, 576): 2, (1536, 576): 2, (576, 1536): 1}, 30),
    "tiny": ({(64, 64): 2, (160, 64): 1}, 2),
}
Step = Callable[[], Any]


def parameters(name: str, device: str) -> list[torch.nn.Parameter]:
    """Random matrices of a set with random gradients."""
    layer, layers = SETS[name]
    torch.manual_seed(0)
    found = []
    for _ in range(layers):
        for shape, count in layer.items():
            for _ in range(count):
                parameter = torch.nn.Parameter(torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02)
                parameter.grad = torch.randn(shape, device=device, dtype=torch.bfloat16) * 1e-3
                found.append(parameter)
    return found


def work(name: str, steps: int = 5) -> float:
    """Floating-point operations of the cheaper Newton-Schulz form, symmetric products at half their dense cost."""
    layer, layers = SETS[name]
    total = 0.0
    for shape, count in layer.items():
        m, n = min(shape), max(shape)
        standard = steps * (3 * m * m * n + m**3)
        gram = 6 * m * m * n + (4 * steps - 6) * m**3
        total += layers * count * min(standard, gram)
    return total


def matmul_rate(device: str) -> float:
    """FLOP/s of a bfloat16 product of 8192³ (512³ on a CPU)."""
    size = 8192 if device == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / measure(lambda: a @ a, device, warmup=3, runs=7).median


def seconds(step: Step, device: str) -> float:
    """Of one step."""
    sync(device)
    started = time.perf_counter()
    step()
    sync(device)
    return time.perf_counter() - started


def in_turn(
    functions: dict[str, Step], device: str, warmup: int, runs: int, timed: Callable[[Step], float] | None = None
) -> dict[str, float]:
    """Median seconds of each, measured round by round so that a drift of the machine meets all alike.

    Each round begins with another one: a chip at its power limit is slower after some steps than after others, and
    nobody shall always follow the same one.

    Args:
        timed: runs a step and gives its seconds; None for :func:`seconds`.
    """
    timed = timed or (lambda step: seconds(step, device))
    for function in functions.values():
        for _ in range(warmup):
            function()
    taken: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(runs):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(timed(functions[name]))
    return {name: median(values) for name, values in taken.items()}


def peers(matrices: list[torch.nn.Parameter]) -> Iterator[tuple[str, Step]]:
    """Steps of the other packages that can be imported here, with their own defaults, and dion's kernels too."""
    found: list[tuple[str, str, dict[str, Any]]] = [
        ("gram-newton-schulz", "gram_newton_schulz.muon", {}),
        ("dion", "dion", {}),
        ("dion with its Triton kernels", "dion", {"use_triton": True}),
    ]
    if not all(map(importlib.util.find_spec, ("quack", "cutlass"))):
        found[0] = ("gram-newton-schulz without its kernels", found[0][1], {"ns_use_kernels": False})
    for name, module, options in found:
        try:
            step = importlib.import_module(module).Muon(matrices, lr=1e-5, **options).step
            step()
        except (ImportError, RuntimeError) as error:
            print(f"{AREA} | {name} is left out: {str(error).splitlines()[0]}", flush=True)
            continue
        yield name, step


def steps(name: str, device: str, smoke: bool) -> Iterator[Row]:
    """Our steps and torch's in turn; the peers that others wrote come last, since some compile for minutes."""
    from effpass.trainers.mona import MONA

    matrices = parameters(name, device)
    case = f"{name}: {sum(p.numel() for p in matrices) / 1e6:.0f} M parameters in {len(matrices)} matrices"
    warmup, runs = (1, 2) if smoke else (3, 16)
    bound = work(name) / matmul_rate(device) * 1e3

    started = time.perf_counter()
    MONA(matrices, lr=1e-5).step()
    if device == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - started
    yield row(AREA, case, "first step, kernels built or read from disk", first, "s", device=device)

    ours: dict[str, Step] = {
        "MONA": MONA(matrices, lr=1e-5).step,
        "MONA, float32 buffer": MONA(matrices, lr=1e-5, acceleration_dtype=torch.float32).step,
        "Muon (alpha=0)": MONA(matrices, lr=1e-5, alpha=0).step,
    }
    peer = "torch.optim.Muon"
    times = in_turn({**ours, peer: torch.optim.Muon(matrices, lr=1e-5).step}, device, warmup, runs)
    for own in ours:
        yield row(
            AREA, case, f"step, {own}", times[own] * 1e3, "ms", device=device, peer=times[peer] * 1e3, peer_name=peer,
            bound=bound, runs=runs,
        )  # fmt: skip
    for own in tuple(ours)[:2]:
        yield row(
            AREA, case, f"{own}: time over Muon (alpha=0)", (times[own] / times["Muon (alpha=0)"] - 1) * 100, "%",
            device=device, runs=runs,
        )  # fmt: skip
    for peer, step in peers(matrices):
        both = {own: ours[own] for own in ("MONA", "Muon (alpha=0)")}
        times = in_turn({**both, peer: step}, device, warmup, runs)
        for own in both:
            yield row(
                AREA, case, f"step, {own}", times[own] * 1e3, "ms", device=device, peer=times[peer] * 1e3,
                peer_name=peer, bound=bound, runs=runs,
            )  # fmt: skip


def step_822m(device: str, smoke: bool) -> Iterator[Row]:
    """16 layers of width 2048, inner width 5632."""
    yield from steps("tiny" if smoke else "822m", device, smoke)


def smollm2(device: str, smoke: bool) -> Iterator[Row]:
    """SmolLM2-135M's 210 matrices: small, and so bound by launches."""
    yield from steps("tiny" if smoke else "smollm2", device, smoke)


def ranks_822m(device: str, smoke: bool) -> Iterator[Row]:
    """The same matrices on the ranks that torchrun started."""
    from benchmarks import optimizer_ranks  # which imports this module

    yield from optimizer_ranks.ranks_822m(device, smoke)


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    "step_822m": step_822m, "smollm2": smollm2, "ranks_822m": ranks_822m,
}  # fmt: skip
