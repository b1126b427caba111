"""The Triton kernels of trainable sparse attention: interpreted and compiled without a GPU, and run on one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import routed_cases
import torch
from routed_cases import CASES, Case, expected, mask_of, ratio
from torch.utils.checkpoint import checkpoint

from effpass.lowering.ops import routed_blocks
from effpass.lowering.ops.routed_attention import GRADIENT_TOLERANCE, TOLERANCE, trainable_sparse_attention

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
SHARED_MEMORY = 227 * 1024  # bytes that one program may have at compute capability 9.0
PROGRAM = Path(routed_cases.__file__).with_name("routed_kernel_cases.py")
ops = torch.ops.effpass


def run(*mode: str, **environment: str) -> dict:
    command = [sys.executable, "-W", "ignore", str(PROGRAM), *mode]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def exceeding(found: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """What is out of tolerance, NaN included."""
    limit = dict.fromkeys(found, GRADIENT_TOLERANCE[dtype]) | {"output": TOLERANCE[dtype]}
    limit |= {"choice": 0, "coverage": 1e-6}
    return {name: value for name, value in found.items() if not value <= limit[name]}


@needs_triton
def test_interpreted_kernels_against_dense_sums():
    found = run("interpret", TRITON_INTERPRET="1")
    assert len(found) == 7
    for name, errors in found.items():
        assert errors.keys() == {"choice", "coverage", "output", "d q", "d k", "d v"}
        assert exceeding(errors, getattr(torch, name.rpartition(", ")[2])) == {}, name


@needs_triton
def test_values_that_the_device_alone_sees_are_asserted():
    said = run("outside", TRITON_INTERPRET="1")
    assert "cu_seqlens does not rise from 0 to T" in said["long sequence"]
    assert "the budget is less than the two blocks always chosen" in said["small budget"]
    assert "the budget is above max_budget" in said["large budget"]


KINDS = [("bfloat16", SHARED_MEMORY)]
KINDS += [
    (kind, room) for kind in ("small blocks", "latents", "wide", "float32") for room in (SHARED_MEMORY, 99 * 1024)
]


@needs_triton
@pytest.mark.parametrize(
    ("kind", "room"), [KINDS[0], *(pytest.param(*kind, marks=pytest.mark.slow) for kind in KINDS[1:])]
)
def test_kernels_compile_without_a_gpu_and_fit(tmp_path: Path, kind: str, room: int):
    shared = run("compile", kind, str(room), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert {name.rpartition(".")[2] for name in shared} == {
        "_means", "_score", "_select", "_count", "_place", "_attend", "_merge", "_delta", "_query_gradient", "_sum",
        "_key_gradient", "_add_pieces",
    }  # fmt: skip
    assert {name: size for name, size in shared.items() if size > room} == {}


# -- on a GPU ---------------------------------------------------------------------------------------------------------

ON_GPU = {
    **{name: CASES[name] for name in ("grouped, packed, an empty sequence", "three heads, odd sizes")},
    "128, grouped, packed": Case((0, 300, 301, 700, 1100), 16, 4, 128, 128, 128, 512, 1024, 128**-0.5),
    "128, blocks of 256": Case((0, 1500), 8, 2, 128, 128, 256, 768, 1024, 128**-0.5),
    "64, seven heads to one of keys": Case((0, 700, 1300), 14, 2, 64, 64, 64, 256, None, 0.125),
    "192 and 128, every head its own keys": Case((0, 900), 4, 4, 192, 128, 128, 384, 384, 192**-0.5),
    "256": Case((0, 520), 8, 1, 256, 256, 64, 256, 256, 0.0625),
    "blocks of 512, budget above the length": Case((0, 900), 4, 2, 128, 128, 512, 4096, None, 128**-0.5),
}
# Each pair is compiled for itself.
TYPES = [
    *((name, torch.bfloat16) for name in ON_GPU),
    ("128, grouped, packed", torch.float16),
    ("three heads, odd sizes", torch.float32),
    ("128, grouped, packed", torch.float32),
]


@pytest.fixture
def poisoned():
    """Uninitialized memory holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(case: Case, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Output, coverage and gradients, and what was chosen."""
    *leaves, d_out = (x.to("cuda", dtype) for x in case.tensors(dtype))
    leaves = [x.requires_grad_() for x in leaves]
    ends, budget = case.cu_seqlens("cuda"), case.budget_on("cuda")
    chosen, _ = ops.route_blocks(
        leaves[0].detach(), leaves[1].detach(), ends, budget, case.block, case.max_budget, case.scale
    )
    out, coverage = trainable_sparse_attention(
        *leaves, ends, budget, block=case.block, max_budget=case.max_budget, scale=case.scale
    )
    found = torch.autograd.grad(out, leaves, d_out)
    return {"output": out, "coverage": coverage, **dict(zip(("d q", "d k", "d v"), found, strict=True))}, chosen


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), TYPES)
def test_kernels_against_dense_sums(poisoned, name, dtype):
    case = ON_GPU[name]
    found, chosen = on_gpu(case, dtype)
    wanted = expected(case, mask_of(chosen, case.ends, case.block), dtype)
    ratios = {n: ratio(found[n], x) for n, x in wanted.items()}
    assert exceeding(ratios, dtype) == {}, ratios
    again, chosen_again = on_gpu(case, dtype)
    assert torch.equal(chosen, chosen_again)
    assert all(torch.equal(found[n], again[n]) for n in found)  # the same bits


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), TYPES)
def test_what_is_chosen_scores_as_high_as_the_best(name, dtype):
    """Scores are rounded, so that of two that are nearly equal either may be chosen."""
    case = ON_GPU[name]
    q, k, *_ = (x.to(dtype) for x in case.tensors(dtype))
    call = (case.block, case.max_budget, case.scale)
    found, coverage = ops.route_blocks(q.cuda(), k.cuda(), case.cu_seqlens("cuda"), case.budget_on("cuda"), *call)
    wanted, held = ops.route_blocks(q.double(), k.double(), case.cu_seqlens(), case.budget_on(), *call)
    found = found.cpu()
    assert torch.equal(found >= 0, wanted >= 0)
    blocks = routed_blocks.Blocks.of(case.cu_seqlens(), case.tokens, case.block)
    rows = torch.arange(case.tokens)
    means = routed_blocks.block_means(k.double(), blocks, case.block)
    scores = routed_blocks.router_scores(q.double(), means, blocks, rows, case.scale)
    of_found, of_wanted = (scores.gather(2, x.clamp(min=0).long()).masked_fill(x < 0, 0) for x in (found, wanted))
    spread = float(scores[scores > float("-inf")].abs().max())
    assert float((of_found.sum(2) - of_wanted.sum(2)).abs().max()) <= 2e-3 * spread
    assert abs(float(coverage) - float(held)) <= 1e-3


@pytest.mark.gpu
def test_a_long_sequence_in_many_parts_is_the_same_as_in_one(monkeypatch):
    from effpass.lowering.kernels import routed_blocks as choosing
    from effpass.lowering.kernels import routed_rows

    case = Case((0, 3000, 8192), 8, 2, 128, 128, 128, 2048, 2048, 128**-0.5)
    whole, chosen = on_gpu(case, torch.bfloat16)
    monkeypatch.setattr(routed_rows, "_BYTES", 1 << 22)
    monkeypatch.setattr(choosing, "_SCORES", 1 << 16)
    parts, chosen_again = on_gpu(case, torch.bfloat16)
    assert torch.equal(chosen, chosen_again)
    # Tokens that share a program with a block's own go through the loop that masks.
    assert all(ratio(parts[n], whole[n].double()) <= 1e-3 for n in whole)


@pytest.mark.gpu
def test_a_budget_of_the_length_is_dense_attention():
    case = Case((0, 4096), 8, 2, 128, 128, 256, 4096, None, 128**-0.5)
    found, _ = on_gpu(case, torch.bfloat16)
    *leaves, d_out = (x.to("cuda", torch.bfloat16).transpose(0, 1)[None] for x in case.tensors(torch.bfloat16))
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    for name, x in zip(("output", "d q", "d k", "d v"), (out, *torch.autograd.grad(out, leaves, d_out)), strict=True):
        limit = TOLERANCE if name == "output" else GRADIENT_TOLERANCE
        assert ratio(found[name], x[0].transpose(0, 1).double()) <= limit[torch.bfloat16], name


@pytest.mark.gpu
def test_nothing_waits_for_the_device_and_a_graph_replays_other_budgets():
    case = Case((0, 700, 3000), 8, 2, 128, 128, 128, 512, 1024, 128**-0.5)
    *leaves, d_out = (x.to("cuda", torch.bfloat16) for x in case.tensors(torch.bfloat16))
    leaves = [x.requires_grad_() for x in leaves]
    ends, budget = case.cu_seqlens("cuda"), case.budget_on("cuda")

    def step() -> tuple[torch.Tensor, ...]:
        out, coverage = trainable_sparse_attention(*leaves, ends, budget, block=128, max_budget=1024)
        return out.detach(), coverage, *torch.autograd.grad(out, leaves, d_out)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    for keys in (256, 1000):
        budget.fill_(keys)
        graph.replay()
        for captured, eager in zip(held, step(), strict=True):
            assert torch.equal(captured, eager)


@pytest.mark.gpu
def test_a_checkpoint_of_a_compiled_layer_and_other_budgets_compile_nothing():
    torch._dynamo.utils.counters.clear()
    case = Case((0, 900, 2000), 8, 2, 128, 128, 128, 512, 1024, 128**-0.5)
    *leaves, d_out = (x.to("cuda", torch.bfloat16) for x in case.tensors(torch.bfloat16))
    leaves = [x.requires_grad_() for x in leaves]
    budgets = torch.tensor([256, 512, 1000], dtype=torch.int32, device="cuda")

    def attend(q, k, v, ends, budget):
        return trainable_sparse_attention(q * 2, k, v, ends, budget, block=128, max_budget=1024)[0]

    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    for layer in range(3):
        outputs = [
            attend(*leaves, case.cu_seqlens("cuda"), budgets[layer]),
            compiled(*leaves, case.cu_seqlens("cuda"), budgets[layer]),
            checkpoint(attend, *leaves, case.cu_seqlens("cuda"), budgets[layer], use_reentrant=False),
        ]
        first, *others = ([x, *torch.autograd.grad(x, leaves, d_out)] for x in outputs)
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.utils.counters.clear()


@pytest.mark.gpu
def test_views_of_one_projection_are_read_in_place():
    case = replace(ON_GPU["128, grouped, packed"], ends=(0, 400))
    fused = torch.randn(400, 24 * 128, device="cuda", dtype=torch.bfloat16)
    views = [x.unflatten(-1, (-1, 128)) for x in fused.split([16 * 128, 4 * 128, 4 * 128], -1)]
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in views]
    arguments = (case.cu_seqlens("cuda"), case.budget_on("cuda"))
    found, *others = (
        trainable_sparse_attention(*x, *arguments, block=128)[0]
        for x in (views, heads_first, [x.contiguous() for x in views])
    )
    assert all(torch.equal(found, x) for x in others)
