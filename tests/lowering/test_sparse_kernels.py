"""The Triton kernels of sparse attention: interpreted and compiled without a GPU, and run on one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sparse_kernel_cases
import torch

from effpass.lowering.ops import rope_cache_write, rope_page_write  # noqa: F401  (registers the operators)

CASES = [name for name, _, _ in sparse_kernel_cases.cases(device=torch.device("cpu"), dtype=torch.float32)]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
SHARED_MEMORY = 227 * 1024  # bytes that one program may have at compute capability 9.0


def run(*arguments: str, program: str = sparse_kernel_cases.__file__, **environment: str) -> dict:
    command = [sys.executable, "-W", "ignore", program, *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    return run("interpret", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_against_brute_force(interpreted, name):
    tolerance = sparse_kernel_cases.tolerance(name, torch.float32)
    assert all(value <= tolerance for value in interpreted[name].values()), interpreted[name]


@needs_triton
def test_the_largest_of_any_scores_are_those_of_a_sort():
    program = Path(sparse_kernel_cases.__file__).with_name("largest_cases.py")
    found = run(program=str(program), TRITON_INTERPRET="1")
    assert len(found) == 23
    assert {name: wrong for name, wrong in found.items() if any(wrong.values())} == {}


@needs_triton
def test_kernels_compile_without_a_gpu_and_fit(tmp_path: Path):
    shared = run("compile", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    launches = [name.rpartition(".")[2] for name in shared if name.startswith("GQA: ")]
    assert launches == ["_index", "_score", "_choose", "_attend"]  # a prompt's, and three a step
    assert [name for name in shared if name.startswith("dense latents, torch.bfloat16")] == [
        f"dense latents, torch.bfloat16: latent_attention.{kernel}" for kernel in ("_latent", "_combine")
    ]
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
def test_kernels_against_brute_force(poisoned, name, dtype):
    of = {"device": torch.device("cuda"), "dtype": dtype}
    (case,) = [case for known, case, _ in sparse_kernel_cases.cases(**of) if known == name]
    found = case(torch.ops.effpass)
    assert all(value <= sparse_kernel_cases.tolerance(name, dtype) for value in found.values()), found
    assert case(torch.ops.effpass) == found  # the same bits


@pytest.mark.gpu
def test_the_largest_of_any_scores_on_a_gpu():
    import largest_cases

    found = {name: largest_cases.differences(name, "cuda") for name in largest_cases.CASES}
    assert {name: wrong for name, wrong in found.items() if any(wrong.values())} == {}


def _long_case(levels: str, batch: int, is_pipelined: bool = False):
    from effpass.lowering.ops.two_level_attention_index import KeyIndex, Selection

    of = {"device": torch.device("cuda"), "dtype": torch.bfloat16}
    torch.manual_seed(0)
    slots, length = 40000, 39000
    how = Selection(levels=levels, is_pipelined=is_pipelined)
    keys, values = torch.randn(batch, 2, slots, 128, **of), torch.randn(batch, 2, slots, 128, **of)
    positions = torch.full((batch, slots), -1, dtype=torch.int32, device="cuda")
    positions[:, :length] = torch.arange(length)
    channels = torch.stack([torch.randperm(128)[:32] for _ in range(2)]).to("cuda", torch.int32)
    index = KeyIndex.empty(how, channels, batch, slots, 128, torch.bfloat16)
    filled = torch.tensor([length], dtype=torch.int32, device="cuda")
    index.add(keys, positions, torch.zeros_like(filled), filled - 1, length - 1)
    return index, (
        torch.randn(batch, 8, 1, 128, **of), keys, values, positions, positions[:, length - 1 : length].contiguous(),
        filled, 128**-0.5,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("levels", "batch"), [("both", 1), ("both", 5), ("blocks", 2), ("tokens", 2)])
def test_a_replayed_graph_equals_the_call_that_it_recorded(levels, batch):
    from effpass.lowering.ops.two_level_attention import attend

    index, arguments = _long_case(levels, batch)
    with torch.inference_mode():
        expected = attend(index, *arguments)
        chosen = index.chosen_tokens.clone(), index.chosen_blocks.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attend(index, *arguments)
        for _ in range(50):
            out.fill_(torch.nan)
            index.chosen_tokens.fill_(-7)
            graph.replay()
            assert torch.equal(out, expected)
            assert torch.equal(index.chosen_tokens, chosen[0])
            assert torch.equal(index.chosen_blocks, chosen[1])


@pytest.mark.gpu
@pytest.mark.parametrize("levels", ["both", "blocks", "tokens"])
@pytest.mark.parametrize("is_pipelined", [False, True])
def test_long_contexts_choose_what_the_reference_chooses(levels, is_pipelined):
    from effpass.lowering.ops import two_level_attention as operators
    from effpass.lowering.ops.two_level_attention_index import KeyIndex

    if is_pipelined and levels == "tokens":
        pytest.skip("there are no blocks to choose")
    index, arguments = _long_case(levels, 2, is_pipelined)
    host = KeyIndex(index.selection, *(getattr(index, n).cpu() for n in (
        "channels", "statistics", "seen", "labels", "ranges", "scores", "chosen_blocks", "chosen_tokens"
    )))  # fmt: skip
    on_host = [x.cpu().float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x.cpu()
               if isinstance(x, torch.Tensor) else x for x in arguments]  # fmt: skip
    query = arguments[0].clone()
    for current, rest in ((index, arguments), (host, on_host)):
        if is_pipelined:
            torch.ops.effpass.score_blocks(
                query.to(rest[0]), current.statistics, current.seen, rest[5] - 1, current.scores, 64, "min_max", "sum"
            )
    got, expected = operators.attend(index, *arguments), operators.attend(host, *on_host)
    for name in ("chosen_blocks", "chosen_tokens"):
        ours, theirs = getattr(index, name).cpu(), getattr(host, name)
        for a, b in zip(ours.flatten(0, 1).tolist(), theirs.flatten(0, 1).tolist(), strict=True):
            # Sums in another order may turn scores that differ in the last bit.
            assert len(set(a) - set(b)) <= 2
    assert (got.cpu().float() - expected).abs().max() <= 2e-2 * expected.abs().max()
