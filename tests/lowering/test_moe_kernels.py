"""The Triton kernels of experts: interpreted and compiled without a GPU, and run on one.

Triton decides when it is imported whether it interprets, so both run in processes of their own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import moe_kernel_cases
import pytest
import torch
from moe_reference import GATES, error, layer, moe_ffn

from effpass.lowering.ops import moe_ffn_choice as choice
from effpass.lowering.ops.moe_ffn import TOLERANCE
from effpass.lowering.ops.moe_ffn_cost import KERNELS

CASES = list(moe_kernel_cases.CASES)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
SHARED_MEMORY = 227 * 1024  # bytes that one program may have at compute capability 9.0


def run(mode: str, **environment: str) -> dict:
    command = [sys.executable, "-W", "ignore", moe_kernel_cases.__file__, mode]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    return run("interpret", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_against_float64(interpreted, name):
    tolerance = TOLERANCE[torch.float32]
    assert set(interpreted[name]) == set(moe_kernel_cases.INTERPRETED)
    assert all(value <= tolerance for value in interpreted[name].values()), interpreted[name]


@needs_triton
def test_kernels_compile_without_a_gpu_and_fit(tmp_path: Path):
    shared = run("compile", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    # Two layers: the two launches for rows, the four of each kernel with tiles, and two more of a second tile.
    assert len(shared) == 2 * (2 + 4 * 6 + 2 * 2)
    assert {name: size for name, size in shared.items() if size > SHARED_MEMORY} == {}


@pytest.fixture
def poisoned():
    """Uninitialized memory holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in CASES),
        *(("some tokens, biases", dtype) for dtype in (torch.float16, torch.float32)),
    ],
)
def test_kernels_against_float64(poisoned, name, dtype):
    of = {"device": "cuda", "dtype": dtype}
    made = moe_kernel_cases.arguments(name, **of)
    expected, weights = moe_ffn(*made), (made[3], made[5])
    kernels = choice.available(made[0], *weights)
    assert set(moe_kernel_cases.KERNELS) <= set(kernels)
    for kernel in kernels:
        got = choice.run_kernel(kernel, *made)
        assert error(got, expected) <= TOLERANCE[dtype], kernel
        assert torch.equal(choice.run_kernel(kernel, *made), got), kernel  # the same bits


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "by_expert"])
def test_one_recorded_graph_serves_every_routing(kernel):
    """Nothing in it depends on how many rows an expert has: a graph that was recorded with one routing, with others."""
    made = layer(70, 3, 12, 256, 128, dtype=torch.bfloat16, device="cuda")
    x, ids = made[0], made[1]
    run = lambda: choice.run_kernel(kernel, *made, *GATES["SwiGLU"])  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for turn in range(4):
        torch.manual_seed(turn)
        x.normal_()
        ids.copy_(torch.rand(70, 12 + 2 * turn).topk(3).indices if turn < 3 else torch.full((70, 3), 5))
        out.fill_(torch.nan)
        graph.replay()
        assert error(out, moe_ffn(*made, *GATES["SwiGLU"])) <= TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_the_operator_chooses_and_differentiates_on_a_gpu():
    made = layer(64, 2, 8, 128, 64, dtype=torch.bfloat16, device="cuda")
    expected = layer(64, 2, 8, 128, 64, dtype=torch.bfloat16)  # the same numbers on the CPU
    gradients = []
    for tensors in (made, [t if t is None or not t.is_floating_point() else t.double() for t in expected]):
        leaves = [t.requires_grad_() for t in tensors if t is not None and t.is_floating_point()]
        out, _ = torch.ops.effpass.moe_ffn(*tensors, *GATES["SwiGLU"], True)
        out.sin().sum().backward()
        gradients.append([leaf.grad.cpu() for leaf in leaves])
    for got, reference in zip(*gradients, strict=True):
        assert error(got, reference) < 3e-2  # three products in bfloat16


@pytest.mark.gpu
def test_decoding_waits_for_nobody():
    made = layer(4, 2, 8, 128, 64, dtype=torch.bfloat16, device="cuda")
    torch.ops.effpass.moe_ffn(*made, *GATES["SwiGLU"], False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.effpass.moe_ffn(*made, *GATES["SwiGLU"], False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
