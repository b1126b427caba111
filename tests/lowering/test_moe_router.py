"""`moe_router` against loops over experts and transformers' routers; its kernel interpreted, compiled and run."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import router_kernel_cases
import torch
from router_kernel_cases import CASES, Case, errors
from torch.utils.flop_counter import FlopCounterMode

from effpass.core.errors import EffpassError
from effpass.lowering.ops.moe_router import TOLERANCE, _moe_router, has_kernel

op = torch.ops.effpass.moe_router
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
SHARED_MEMORY = 227 * 1024  # bytes that one program may have at compute capability 9.0


def check(found: dict[str, Any], dtype: torch.dtype) -> None:
    assert found["experts"] == 0, found
    assert found["weights"] <= TOLERANCE[dtype], found


@pytest.fixture
def poisoned():
    """Uninitialized memory holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# -- the operator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_it_chooses_as_loops_do(name: str) -> None:
    check(errors(name, op, torch.float32, "cpu", torch.float32), torch.float32)
    check(errors(name, op, torch.bfloat16, "cpu", torch.float16), torch.float16)


# module, class, attributes of its configuration beside the sizes; arguments of the operator
ROUTERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Mixtral": ("mixtral.MixtralTopKRouter", {}, {}),
    "Qwen3-MoE": ("qwen3_moe.Qwen3MoeTopKRouter", {"norm_topk_prob": True}, {}),
    "OLMoE": ("olmoe.OlmoeTopKRouter", {"norm_topk_prob": False}, {"norm_topk_prob": False}),
    "GPT-OSS": ("gpt_oss.GptOssTopKRouter", {}, {}),
    "DeepSeek-V2, greedy": (
        "deepseek_v2.DeepseekV2TopkRouter",
        {"topk_method": "greedy"},
        {"norm_topk_prob": False, "scale": 1.8},
    ),
    "DeepSeek-V2, groups": (
        "deepseek_v2.DeepseekV2TopkRouter",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
        {"norm_topk_prob": False, "scale": 1.8, "n_group": 4, "topk_group": 2},
    ),
}
for _name, _family, _group in (
    ("DeepSeek-V3", "deepseek_v3.DeepseekV3TopkRouter", 4),
    ("GLM-4-MoE", "glm4_moe.Glm4MoeTopkRouter", 2),
    ("GLM-4.7-Flash", "glm4_moe_lite.Glm4MoeLiteTopkRouter", 1),
):
    _groups = {"n_group": _group, "topk_group": (_group + 1) // 2}
    _arguments = {"scoring_func": "sigmoid", "eps": 1e-20, "scale": 1.8, "bias": True}
    ROUTERS[_name] = (_family, {"norm_topk_prob": True, **_groups}, {**_arguments, **_groups})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROUTERS)
def test_it_is_transformers_router(name: str, dtype: torch.dtype) -> None:
    place, settings, arguments = ROUTERS[name]
    family, cls = place.split(".")
    experts, tokens, top_k = 16, 40, 3
    config: Any = type("Config", (), {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8, **settings})()
    config.hidden_size = config.num_experts = config.num_local_experts = config.n_routed_experts = experts
    config.num_experts_per_tok = top_k
    router = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), cls)(config)
    generator = torch.Generator().manual_seed(0)
    # The router's weight is the identity, so that its logits are different numbers in either dtype.
    x = torch.stack([torch.randperm(experts, generator=generator) for _ in range(tokens)]) / 4 - 2
    bias = torch.randn(experts, generator=generator) if arguments.get("bias") else None
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))
        router.to(dtype)
        if bias is not None:
            router.e_score_correction_bias = bias
        logits, weights, chosen = router(x.to(dtype))
    case = Case(tokens, experts, top_k, **{**arguments, "bias": bias is not None})
    ours, our_weights = op(logits, bias, *case.numbers, weights.dtype)
    assert torch.equal(ours.sort(-1).values, chosen.sort(-1).values)
    by_expert, our_by_expert = (
        torch.zeros(tokens, experts).scatter_(1, ids, w.float()) for ids, w in ((chosen, weights), (ours, our_weights))
    )
    torch.testing.assert_close(our_by_expert, by_expert, rtol=TOLERANCE[weights.dtype], atol=0)


def test_rows_of_noise_and_nan_have_different_experts_in_range() -> None:
    logits = torch.randn(200, 24)
    logits[torch.rand(200, 24) < 0.3] = float("nan")
    for case in (Case(200, 24, 6), CASES["groups of odd sizes"]):
        arguments = case.arguments(torch.float32, "cpu")
        logits = logits.repeat(1, 3)[: case.tokens, : case.experts]
        chosen, _ = op(logits, *arguments[1:])
        assert chosen.is_contiguous()
        assert all(len(set(row)) == case.top_k and 0 <= min(row) <= max(row) < case.experts for row in chosen.tolist())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scoring_func": "sigmiod"}, "'sigmiod'.*sigmoid"),
        ({"logits": torch.zeros(2, 3, 8)}, r"logits are float32 \(2, 3, 8\)"),
        ({"logits": torch.zeros(2, 8, dtype=torch.long)}, r"logits are int64 \(2, 8\)"),
        ({"bias": torch.zeros(7)}, r"the bias is \(7,\), expected \(8,\)"),
        ({"scoring_func": "softmax"}, "a bias with softmax scores"),
        ({"n_group": 3}, "2 of 3 groups of 8 experts"),
        ({"topk_group": 5}, "5 of 4 groups of 8 experts"),
        ({"top_k": 5}, "5 experts of 4 in 2 groups of 2"),
        ({"top_k": 0}, "0 experts of 4"),
        ({"n_group": 8}, "scored by two experts, and each has one"),
    ],
)
def test_bad_arguments(changed: dict[str, Any], message: str) -> None:
    given = {"logits": torch.zeros(2, 8), "bias": torch.zeros(8), "top_k": 2, "scoring_func": "sigmoid", "n_group": 4}
    given |= {"topk_group": 2, "norm_topk_prob": True, "eps": 0.0, "scale": 1.0, "dtype": torch.float32}
    op(**given)
    for device in ("cpu", "meta"):
        tensors = {k: v.to(device) for k, v in (given | changed).items() if isinstance(v, torch.Tensor)}
        with pytest.raises(EffpassError, match=message):
            op(**{**given, **changed, **tensors})


def test_opcheck_and_flops() -> None:
    for name in ("Qwen3, no norm", "DeepSeek-V3", "no token"):
        torch.library.opcheck(op, CASES[name].arguments(torch.float32, "cpu", torch.bfloat16))
    with FlopCounterMode(display=False) as counter:
        op(*CASES["GLM-4.7-Flash"].arguments(torch.float32, "cpu"))
    assert counter.get_total_flops() == 0


def test_there_is_no_kernel_for_a_cpu() -> None:
    assert not has_kernel(torch.device("cpu"), torch.float32, 1)
    assert not has_kernel(torch.device("cuda"), torch.float64, 1)


# -- the kernel -------------------------------------------------------------------------------------------------------


def run(mode: str, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", router_kernel_cases.__file__, mode]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@needs_triton
def test_interpreted_kernel_against_loops() -> None:
    found = run("interpret", TRITON_INTERPRET="1")
    assert {name.removesuffix(", bfloat16") for name in found} == set(CASES)
    for name, of_case in found.items():
        check(of_case, torch.bfloat16 if name.endswith("bfloat16") else torch.float32)


@needs_triton
def test_the_kernel_compiles_without_a_gpu_and_fits(tmp_path: Path) -> None:
    shared = run("compile", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert len(shared) == 5
    assert max(shared.values()) <= SHARED_MEMORY


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_kernel_against_loops(poisoned: None, name: str, dtype: torch.dtype) -> None:
    assert has_kernel(torch.device("cuda"), dtype, 1)
    check(errors(name, op, dtype, "cuda", dtype), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [Case(5000, 64, 4, **router_kernel_cases.DEEPSEEK), CASES["DeepSeek-V3"], CASES["DeepSeek-V2"]]
)
def test_the_kernel_chooses_the_experts_of_the_reference(case: Case) -> None:
    """Also where two scores differ by a last bit: the sigmoid is PyTorch's."""
    _, bias, *numbers = case.arguments(torch.float32, "cuda")
    logits = torch.randn(5000, case.experts, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) * 3
    chosen, weights = op(logits, bias, *numbers)
    expected, expected_weights = _moe_router(logits, bias, *numbers)
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=0)


@pytest.mark.gpu
def test_a_replayed_graph_equals_the_call_that_it_recorded() -> None:
    arguments = CASES["GLM-4.7-Flash"].arguments(torch.float32, "cuda", torch.bfloat16)
    logits = arguments[0].clone()
    expected = op(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = op(logits, *arguments[1:])
    for _ in range(3):
        logits.zero_()
        graph.replay()
        assert (found[0] == op(logits, *arguments[1:])[0]).all()
        logits.copy_(arguments[0])
        graph.replay()
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.gpu
def test_more_experts_than_the_kernel_holds_run_on_the_reference() -> None:
    arguments = Case(3, 1500, 40).arguments(torch.float32, "cuda")
    for found, expected in zip(op(*arguments), _moe_router(*arguments), strict=True):
        assert torch.equal(found, expected)
