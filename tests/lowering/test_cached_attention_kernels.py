"""The Triton kernels of the decode operators: interpreted and compiled without a GPU, and run on one.

Triton decides when it is imported whether it interprets, so both run in processes of their own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import kernel_cases
import pytest
import torch

from effpass.lowering.ops import append_positions, greedy_tokens, rotary_table  # noqa: F401  (registers the operators)
from effpass.lowering.ops.cached_attention import TOLERANCE as ATTENTION
from effpass.lowering.ops.fused_linear import TOLERANCE as LINEAR
from effpass.lowering.ops.received_attention import TOLERANCE as RECEIVED

CASES = [name for name, _, _ in kernel_cases.cases(device=torch.device("cpu"), dtype=torch.float32)]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
SHARED_MEMORY = 227 * 1024  # bytes that one program may have at compute capability 9.0


def _tolerances(name: str) -> dict[torch.dtype, float]:
    return {"linear": LINEAR, "received": RECEIVED}.get(name.partition(":")[0], ATTENTION)


def run(mode: str, **environment: str) -> dict:
    command = [sys.executable, "-W", "ignore", kernel_cases.__file__, mode]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    return run("interpret", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_against_float64(interpreted, name):
    tolerance = _tolerances(name)[torch.float32]
    assert all(value <= tolerance for value in interpreted[name].values()), interpreted[name]


@needs_triton
def test_kernels_compile_without_a_gpu_and_fit(tmp_path: Path):
    shared = run("compile", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert len(shared) == 36
    assert {name: size for name, size in shared.items() if size > SHARED_MEMORY} == {}


@pytest.fixture
def poisoned():
    """Uninitialized memory holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_kernels_against_float64(poisoned, name, dtype):
    of = {"device": torch.device("cuda"), "dtype": dtype}
    (case,) = [case for known, case, _ in kernel_cases.cases(**of) if known == name]
    tolerance = _tolerances(name)[dtype]
    found = case(torch.ops.effpass)
    assert all(value <= tolerance for value in found.values()), found
    assert case(torch.ops.effpass) == found  # the same bits


@pytest.mark.gpu
def test_a_replayed_graph_equals_the_calls_that_it_recorded():
    """Twelve layers of the five launches, each starting before the one in front has ended."""
    of = {"device": torch.device("cuda"), "dtype": torch.bfloat16}
    B, D, H, G, K, F, S = 2, 576, 9, 3, 64, 1536, 300
    ops = torch.ops.effpass

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, **of) * columns**-0.5

    torch.manual_seed(0)
    sizes = {
        "q": (H * K, D),
        "k": (G * K, D),
        "v": (G * K, D),
        "o": (D, H * K),
        "gate": (F, D),
        "up": (F, D),
        "down": (D, F),
    }
    layers = [{name: weight(*size) for name, size in sizes.items()} for _ in range(12)]
    caches = [(torch.randn(B, G, S, K, **of), torch.randn(B, G, S, K, **of)) for _ in layers]
    norm, angles = torch.ones(D, **of), torch.rand(1, 1, K, **of)
    cos, sin = angles.cos(), angles.sin()
    positions, now, start = kernel_cases.cache(B, S, 1, 200, 7, "cuda")
    start -= 1

    def step(x: torch.Tensor) -> torch.Tensor:
        for layer, (keys, values) in zip(layers, caches, strict=True):
            q, k, v = ops.fused_linear(x, [layer[n] for n in "qkv"], [None] * 3, norm, 1e-5, 0.0, None)
            heads = (x.view(B, 1, -1, K) for x in (q, k, v))
            a = ops.rope_cached_attention(
                *heads, cos, sin, None, None, 0.0, 0.0, keys, values, positions, now, start,
                K**-0.5, 0, 0.0,
            )  # fmt: skip
            (x,) = ops.fused_linear(a.view(B, 1, -1), [layer["o"]], [None], None, 0.0, 0.0, x)
            m = ops.gated_linear(x, layer["gate"], layer["up"], norm, 1e-5, 0.0, "silu")
            (x,) = ops.fused_linear(m, [layer["down"]], [None], None, 0.0, 0.0, x)
        return x

    x = torch.randn(B, 1, D, **of)
    with torch.inference_mode():
        expected = step(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step(x)
        for _ in range(20):
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(out, expected)
