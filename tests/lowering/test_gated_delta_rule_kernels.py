"""The Triton kernels of the gated delta rule: interpreted and compiled without a GPU, and run on one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import gated_delta_cases
import pytest
import torch
from gated_delta_cases import (
    COMPILED,
    IN_BFLOAT16,
    NAMES,
    SEGMENTED,
    SMALL,
    Case,
    expected,
    far_apart,
    placed,
    ratio,
)

from effpass.lowering.ops.gated_delta_rule import (
    FLOAT16_TOLERANCE,
    GRADIENT_TOLERANCE,
    SUM_TOLERANCE,
    TOLERANCE,
    gated_delta_rule,
)
from effpass.lowering.ops.gated_delta_rule_step import gated_delta_rule_step

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
SHARED_MEMORY = 227 * 1024  # bytes that one program may have at compute capability 9.0


def run(*mode: str, **environment: str) -> dict:
    command = [sys.executable, "-W", "ignore", gated_delta_cases.__file__, *mode]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def exceeding(found: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """What is out of tolerance, NaN included."""
    gradient = GRADIENT_TOLERANCE[dtype]
    limit = dict.fromkeys(found, TOLERANCE[dtype]) | {name: gradient for name in found if name.startswith("d ")}
    limit |= dict.fromkeys(("d A_log", "d dt_bias"), SUM_TOLERANCE[dtype])
    return {name: value for name, value in found.items() if not value <= limit[name]}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    return run("interpret", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in (*SMALL, *SEGMENTED)), *((name, torch.bfloat16) for name in IN_BFLOAT16)],
)
def test_interpreted_kernels_against_the_recurrence(interpreted, name, dtype):
    found = interpreted[f"{name}, {str(dtype).removeprefix('torch.')}"]
    assert {"output", "state", "d q", "d k", "d v", "d gate", "d beta"} <= found.keys()
    assert exceeding(found, dtype) == {}


@needs_triton
def test_segments_that_take_states_to_zero_are_found(interpreted):
    faded = {name: interpreted["faded"][f"{name}, float32"] for name in SEGMENTED}
    assert {name for name, share in faded.items() if share > 0} == {"kda, resets, in segments"}
    assert faded["kda, resets, in segments"] >= 0.5


@needs_triton
def test_heads_far_apart_are_found():
    assert run("far", TRITON_INTERPRET="1") == {"forward": True, "backward": True, "step": True}


@needs_triton
def test_what_lies_outside_is_not_read():
    said = run("outside", TRITON_INTERPRET="1")
    assert "outside the tensors of the launch" in said["short state"]
    assert "cu_seqlens does not rise from 0 to T" in said["long sequence"]


@needs_triton
@pytest.mark.parametrize(
    "kind", [kind if kind == "bfloat16" else pytest.param(kind, marks=pytest.mark.slow) for kind in COMPILED]
)
def test_kernels_compile_without_a_gpu_and_fit(tmp_path: Path, kind: str):
    shared = run("compile", kind, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    launches = [name.rpartition(".")[2] for name in shared]
    joins = [] if kind in ("many heads", "one token") else ["join"]
    assert launches == ["inside", "state_forward", *joins, "state_backward", "value_gradient", "key_gradient", "_step"]
    assert {name: size for name, size in shared.items() if size > SHARED_MEMORY} == {}


# -- on a GPU ---------------------------------------------------------------------------------------------------------

LARGER = {
    **SMALL,
    "fg2+, bounded, 128": Case("fg2+", "bounded", 300, 2, 2, 2, 128, 128),
    "fg2, 128": Case("fg2", "softplus", 257, 1, 2, 4, 128, 128),
    "kda, bounded, many programs": Case("kda", "bounded", 130, 4, 40, 40, 128, 128),
    "kda, decay to -60, 256": Case("kda", "log", 200, 1, 1, 2, 256, 256),
    "kda, 64 and 128, packed": Case("kda", "bounded", 256, 1, 1, 2, 64, 128, ends=(0, 15, 100, 256)),
    "kda, 9 heads of 64": Case("kda", "bounded", 512, 2, 9, 9, 64, 64),
    "gdn, 9 heads of 64": Case("gdn", "bounded", 512, 2, 9, 9, 64, 64),
    "gdn, 128": Case("gdn", "softplus", 500, 2, 2, 4, 128, 128),
    "gdn, 96 and 192": Case("gdn", "softplus", 140, 1, 2, 2, 96, 192),
    "fg2+, bounded, segments": Case("fg2+", "bounded", 1100, 1, 1, 2, 128, 128),
    "kda, segments of packed sequences": Case("kda", "softplus", 1700, 1, 2, 2, 64, 128, ends=(0, 40, 40, 1700)),
    "fg2+, bounded, 256": Case("fg2+", "bounded", 200, 1, 1, 2, 256, 256),
    "fg2, 256": Case("fg2", "softplus", 140, 1, 2, 2, 256, 256),
    "gdn, decay to -60, segments, 256": Case("gdn", "log", 900, 1, 1, 1, 256, 256),
}


@pytest.fixture
def poisoned():
    """Uninitialized memory holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(case: Case, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs and gradients, found and expected."""
    tensors, gradients, wanted = expected(case, dtype)
    given = [None if x is None else x.requires_grad_() for x in placed(tensors, dtype, "cuda")]
    ends = None if case.ends is None else torch.tensor(case.ends, dtype=torch.int32, device="cuda")
    bound, scale, normalize, logits = case.settings
    output, state = gated_delta_rule(
        *given[:6], A_log=given[6], dt_bias=given[7], initial_state=given[8], cu_seqlens=ends, lower_bound=bound,
        scale=scale, normalize=normalize, beta_logits=logits,
    )  # fmt: skip
    leaves = {name: x for name, x in zip(NAMES, given, strict=True) if x is not None}
    of_outputs = [gradients[0].to("cuda", dtype), gradients[1].to("cuda", state.dtype)]
    found = torch.autograd.grad([output, state], list(leaves.values()), of_outputs)
    return {"output": output, "state": state, **{f"d {n}": g for n, g in zip(leaves, found, strict=True)}}, wanted


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", LARGER)
def test_kernels_against_the_recurrence(poisoned, name, dtype):
    found, wanted = on_gpu(LARGER[name], dtype)
    smallest = torch.finfo(dtype).smallest_normal if dtype == torch.float16 else 0
    least = {n: FLOAT16_TOLERANCE if x.abs().max() < smallest else 0 for n, x in wanted.items()}
    ratios = {n: ratio(found[n], x, least[n]) for n, x in wanted.items()}
    assert exceeding(ratios, dtype) == {}, ratios
    again, _ = on_gpu(LARGER[name], dtype)
    assert all(torch.equal(found[n], again[n]) for n in wanted)  # the same bits


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("mode", ["fg2+", "gdn"])
def test_a_step_in_a_graph_continues_a_prompt(mode, batch):
    case = Case(mode, "bounded", 67, batch, 2, 4, 128, 128)
    tensors, _, wanted = expected(case, torch.bfloat16)
    *given, state = placed(tensors, torch.bfloat16, "cuda")
    options = {"A_log": given[6], "dt_bias": given[7], "lower_bound": -5.0, "scale": case.settings.scale}
    tokens, rest = given[:6], []
    prompt = [None if x is None else x[:, :64] for x in tokens]
    _, state = gated_delta_rule(*prompt, initial_state=state, **options)
    held = [None if x is None else x[:, 64:65].clone() for x in tokens]
    kept = state.clone()
    with torch.inference_mode():
        gated_delta_rule_step(*held, state, **options)
        state.copy_(kept)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = gated_delta_rule_step(*held, state, **options)
        state.copy_(kept)
        for t in range(64, 67):
            for x, whole in zip(held, tokens, strict=True):
                if x is not None:
                    x.copy_(whole[:, t : t + 1])
            graph.replay()
            rest.append(out.clone())
    assert ratio(torch.cat(rest, 1), wanted["output"][:, 64:]) <= TOLERANCE[torch.bfloat16]
    assert ratio(state, wanted["state"]) <= TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_views_of_one_projection_are_read_in_place():
    torch.manual_seed(0)
    fused = torch.randn(2, 100, 3 * 2 * 64, device="cuda", dtype=torch.bfloat16)
    views = [x.unflatten(-1, (2, 64)) for x in fused.chunk(3, -1)]
    gate, beta = torch.randn(2, 100, 2, 64, device="cuda"), torch.randn(2, 100, 2, device="cuda")
    A_log = torch.zeros(2, device="cuda")
    found = gated_delta_rule(*views, gate, beta, A_log=A_log)
    copied = gated_delta_rule(*(x.contiguous() for x in views), gate, beta, A_log=A_log)
    assert all(torch.equal(a, b) for a, b in zip(found, copied, strict=True))


@pytest.mark.gpu
def test_heads_far_apart_on_a_gpu():
    case = Case("kda", tokens=70, heads=3, value_heads=3)
    near = placed(case.tensors(torch.bfloat16), torch.bfloat16, "cuda")
    far = [far_apart(near[0]), near[1], far_apart(near[2]), *near[3:]]
    outputs = [gated_delta_rule(*x[:6], A_log=x[6], dt_bias=x[7], initial_state=x[8])[0] for x in (near, far)]
    assert torch.equal(*outputs)


@pytest.mark.gpu
def test_more_lanes_than_two_dimensions_of_a_grid_hold():
    torch.manual_seed(0)
    lead = (4200, 1, 16)
    q, k, v, gate = (torch.randn(*lead, 16, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    beta, A_log = torch.randn(lead, device="cuda"), torch.zeros(16, device="cuda")
    output, state = gated_delta_rule(q, k, v, gate, beta, A_log=A_log)
    ours = torch.zeros_like(state)
    stepped = gated_delta_rule_step(q, k, v, gate, beta, None, ours, A_log=A_log)
    for found, other in ((output, stepped), (state, ours)):
        assert ratio(found, other.double()) <= TOLERANCE[torch.bfloat16]
    last, _ = gated_delta_rule(*(x[-8:] for x in (q, k, v, gate, beta)), A_log=A_log)
    assert ratio(output[-8:], last.double()) <= TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_thousands_of_tokens_that_hardly_decay(poisoned, dtype):
    """Against chunks in float64, whose equality to the recurrence the CPU's tests show."""
    torch.manual_seed(0)
    lead = (2, 3000, 4)
    q, k, v, gate, beta, write = (torch.randn(*lead, 128, device="cuda").to(dtype) for _ in range(6))
    A_log, dt_bias = torch.rand(4, device="cuda").mul(2.7), torch.full((4, 128), -6.0, device="cuda")
    given = [x.requires_grad_() for x in (q, k, v, (gate * 0.1).detach(), beta, write, A_log, dt_bias)]
    d_output = torch.randn(*lead, 128, device="cuda").to(dtype)
    wide = [x.detach().double().requires_grad_() for x in given]
    found, wanted = (gated_delta_rule(*x[:6], A_log=x[6], dt_bias=x[7], lower_bound=-5.0) for x in (given, wide))
    assert max(ratio(a, b) for a, b in zip(found, wanted, strict=True)) <= TOLERANCE[dtype]
    of_found = torch.autograd.grad(found[0], given, d_output)
    of_wanted = torch.autograd.grad(wanted[0], wide, d_output.double())
    names = [f"d {name}" for name in NAMES[:8]]
    ratios = {n: ratio(a, b) for n, a, b in zip(names, of_found, of_wanted, strict=True)}
    assert exceeding(ratios, dtype) == {}, ratios


@pytest.mark.gpu
def test_training_runs_compiled_and_in_a_graph():
    case = Case("fg2+", "bounded", 130, 2, 2, 2, 64, 64)
    tensors, gradients, wanted = expected(case, torch.bfloat16)
    given = [None if x is None else x.requires_grad_() for x in placed(tensors, torch.bfloat16, "cuda")]
    leaves = [x for x in given if x is not None]
    of_outputs = gradients[0].to("cuda", torch.bfloat16), gradients[1].to("cuda", torch.float32)

    def step() -> tuple[torch.Tensor, ...]:
        output, state = gated_delta_rule(
            *given[:6], A_log=given[6], dt_bias=given[7], initial_state=given[8], lower_bound=-5.0, scale=0.3
        )
        return torch.autograd.grad((output, state), leaves, of_outputs)

    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: gated_delta_rule(*x[:6], A_log=x[6], dt_bias=x[7])[0] * 2, fullgraph=True)
    # Copies, since nodes of the leaves that another stream made would be waited for in the graph.
    others = [None if x is None else x.detach().requires_grad_() for x in given[:8]]
    plain = gated_delta_rule(*others[:6], A_log=others[6], dt_bias=others[7])[0] * 2
    torch.testing.assert_close(compiled(*others), plain)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    names = [name for name in wanted if name.startswith("d ")]
    ratios = {name: ratio(x, wanted[name]) for name, x in zip(names, found, strict=True)}
    assert exceeding(ratios, torch.bfloat16) == {}, ratios
