"""The kernels of experts on several ranks: interpreted and compiled without a GPU, and run on one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import expert_kernel_cases
import pytest
import torch

from effpass.lowering.ops.moe_ffn import TOLERANCE

CASES = list(expert_kernel_cases.CASES)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
SHARED_MEMORY = 227 * 1024  # bytes that one program may have at compute capability 9.0


def run(mode: str, **environment: str) -> dict:
    command = [sys.executable, "-W", "ignore", expert_kernel_cases.__file__, mode]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict]:
    return run("interpret", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_against_plain_pytorch(interpreted, name):
    found = interpreted[name]
    assert found["same"]
    assert set(found["errors"]) == {*expert_kernel_cases.KERNELS, "total"}
    assert all(value <= TOLERANCE[torch.float32] for value in found["errors"].values()), found["errors"]


@needs_triton
def test_kernels_compile_without_a_gpu_and_fit(tmp_path: Path):
    shared = run("compile", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    kinds = {name.rstrip("0123456789") for name in shared}
    of_routes = {f"expert_routes.{name}" for name in ("_summarize", "_depart", "_leaves", "_arrive")}
    assert kinds == {*of_routes, "expert_stage._sums", "moe_grouped._grouped", "moe_route._combine", "moe_route._route",
                     "moe_library._gather", "moe_library._gate"}  # fmt: skip
    assert {name: size for name, size in shared.items() if size > SHARED_MEMORY} == {}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_kernels_against_float64(name, dtype):
    kernels = (*expert_kernel_cases.KERNELS, "grouped32", "grouped64")
    if dtype == torch.bfloat16 and name != "odd sizes":  # the library wants rows at 16 bytes
        kernels = (*kernels, "library")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills empty tensors with NaN
    try:
        found = expert_kernel_cases.check(name, kernels, "cuda", dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found["same"]
    assert all(value <= TOLERANCE[dtype] for value in found["errors"].values()), found["errors"]
