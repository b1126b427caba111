"""Kernels of experts on several ranks against plain PyTorch: on a GPU, or, run as a program, without one.

All ranks are played in one process. `python expert_kernel_cases.py interpret` computes float32 cases through Triton's
interpreter; `... compile` compiles the kernels for a GPU that is not there. Both print JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

import torch
from expert_exchange import start
from moe_reference import GATES, error, layer
from offline_kernels import compile_instead
from triton_interpreter import set_up

from effpass.lowering.ops import expert_parallel_routes, expert_parallel_stage
from effpass.lowering.ops.expert_parallel_stage import Experts

# ranks, local experts, experts a token, stages, tokens of each rank, width, inner width; biases and transposed weights
CASES: dict[str, tuple[int, int, int, int, list[int], int, int, bool]] = {
    "several blocks": (2, 4, 3, 2, [150, 7], 72, 40, False),
    "empty ranks": (4, 6, 4, 3, [90, 0, 3, 60], 40, 24, True),
    "one token": (4, 4, 2, 1, [1, 0, 0, 0], 64, 32, False),
    "odd sizes": (3, 5, 6, 5, [20, 70, 2], 37, 19, True),
}
KERNELS = ("grouped16", "grouped128", "by_expert")  # the other tiles differ in numbers alone


def check(name: str, kernels: tuple[str, ...], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Errors of sums that come back, by kernel, and whether all positions are those of the sorts.

    The last rank computes; before a kernel writes, memory is NaN.
    """
    routes = importlib.import_module("effpass.lowering.kernels.expert_routes")
    stage = importlib.import_module("effpass.lowering.kernels.expert_stage")
    world, local, each, stages, tokens, width, inner, biases = CASES[name]
    torch.manual_seed(0)
    ids = [torch.rand(count, world * local + 2).topk(each).indices.to(device) for count in tokens]
    ids[0][:: max(1, len(ids[0]) // 2)] = world * local - 1  # the same expert k times
    weights = [torch.rand(count, each).to(device) for count in tokens]
    plain, made = start(ids, weights, local, stages), start(ids, weights, local, stages, routes)
    me, same = world - 1, True
    for a, b, s in zip(plain.departures, made.departures, made.summaries, strict=True):
        here = s.first < local
        same &= torch.equal(a.tokens, b.tokens.long()) and torch.equal(a.words, b.words)
        same &= torch.equal(a.back[here], b.back.long()[here])
    plan, words = plain.plans[me], plain.words[me]
    expected, got = expert_parallel_routes.arrivals(words, plan), routes.arrivals(words, plan)
    for field in ("order", "starts", "begin", "end"):
        same &= torch.equal(getattr(expected, field).long(), getattr(got, field).long())

    gate = GATES["GPT-OSS" if biases else "SwiGLU"]
    experts = layer(1, 1, local, width, inner, biases=biases, transposed=biases, dtype=dtype, device=device)[3:]
    wide = Experts(*(None if t is None else t.double() for t in experts), gate)
    rows = [torch.randn(count, width).to(device, dtype) for count in tokens]
    x = plain.arrive(rows, me)
    outputs = torch.empty(words.shape[0], width, dtype=torch.float64, device=device)
    for number in range(stages):
        expert_parallel_stage.compute(x.double(), 0, expected, plan, number, wide, outputs)
    reference = expert_parallel_stage.sums(outputs, expected, slice(0, plan.rows_got), each)
    errors = {}
    for kernel in kernels:
        outputs = torch.empty(words.shape[0], width, dtype=dtype, device=device)
        for number in range(stages):
            stage.compute(x, 0, got, plan, number, Experts(*experts, gate), outputs, kernel)
        sums = stage.sums(outputs, got, slice(0, plan.rows_got), each)
        errors[kernel] = error(sums, reference) if sums.numel() else 0.0
    regained = torch.randn(plain.plans[0].rows_sent, width).to(device, dtype)
    of_plain = (regained.double(), plain.summaries[0], plain.departures[0].back, local)
    total = stage.total(regained, made.summaries[0], made.departures[0].back, local)
    errors["total"] = error(total, expert_parallel_stage.total(*of_plain))
    return {"same": bool(same), "errors": errors}


def interpret() -> dict[str, Any]:
    set_up()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills empty tensors with NaN
    importlib.import_module("effpass.lowering.kernels.expert_routes")._MOST_BLOCKS = 4
    return {name: check(name, KERNELS, "cpu", torch.float32) for name in CASES}


def compile_all() -> dict[str, int]:
    """Bytes of shared memory of each kernel, compiled for compute capability 9.0 at the sizes of real layers."""
    names = ("expert_routes", "expert_stage", "moe_grouped", "moe_route", "moe_library")
    modules = [importlib.import_module(f"effpass.lowering.kernels.{name}") for name in names]
    kernels = (
        "_summarize",
        "_depart",
        "_leaves",
        "_arrive",
        "_sums",
        "_combine",
        "_route",
        "_grouped",
        "_gather",
        "_gate",
    )
    launches = compile_instead(modules, kernels)
    routes, stage, _, _, library = modules
    library.linear = lambda rows, weight, bias, groups: rows.new_empty(rows.shape[0], weight.shape[1])
    world, local, each, tokens = 4, 32, 8, 4096
    ids = [torch.rand(tokens, world * local).topk(each).indices for _ in range(world)]
    weights = [torch.rand(tokens, each) for _ in range(world)]
    plain = start(ids, weights, local, 4)
    summary = routes.summarize(ids[0], world, local)
    leaving = routes.departures(summary, ids[0], weights[0], plain.plans[0])
    pairs = routes.arrivals(plain.words[0], plain.plans[0])
    x = torch.empty(plain.plans[0].rows_got, 2048, dtype=torch.bfloat16)
    gate_up, down = (torch.empty(local, *s, dtype=torch.bfloat16) for s in ((1536, 2048), (2048, 768)))
    experts = Experts(gate_up, None, down, None, GATES["SwiGLU"])
    outputs = torch.empty(plain.words[0].shape[0], 2048, dtype=torch.bfloat16)
    for kernel in ("grouped16", "grouped128"):
        stage.compute(x, 0, pairs, plain.plans[0], 1, experts, outputs, kernel)
    library.products(
        x, pairs.words[:, 0], 4, pairs.order, pairs.starts[8:17], pairs.starts[9:17], None, 1000, gate_up[:8], None,
        down[:8], None, *GATES["SwiGLU"],
    )  # fmt: skip
    stage.sums(outputs, pairs, slice(5, 500), each)
    stage.total(outputs, summary, leaving.back, local)
    return {f"{name}{number}": size for number, (name, size) in enumerate(launches)}


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads TRITON_INTERPRET when it is imported"
        print(json.dumps(interpret()))
    else:
        print(json.dumps(compile_all()))
