"""Kernels of trainable sparse attention against dense sums in float64, without a GPU.

`python routed_kernel_cases.py interpret` computes cases through Triton's interpreter, `outside` one that must fail, and
`compile KIND [BYTES]` compiles the kernels for a GPU that is not there, with so much shared memory. All print JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from routed_cases import CASES, Case, brute_choice, expected, mask_of, ratio
from torch import Tensor

from effpass.lowering.kernels import routed_attention, routed_blocks, routed_gradient, routed_index, routed_rows

# Each program is a loop over tokens in NumPy: a case is as small as what it shows.
INTERPRETED = {
    **{name: CASES[name] for name in ("grouped, packed, an empty sequence", "three heads, odd sizes", "blocks of 32")},
    "shorter than a block, many heads": Case((0, 3, 14), heads=34, groups=2, budget=32),
    "budget above the length": Case((0, 20, 37), heads=2, groups=2, budget=1000),
    "blocks of several products": Case((0, 270), heads=1, block=256, budget=512),
}
IN_BFLOAT16 = ("three heads, odd sizes",)


def spread(x: Tensor, way: int) -> Tensor:
    """The same values as transformers' layers leave them: heads first, side by side, or inside a wider row."""
    tokens, heads, size = x.shape
    if way == 0:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if way == 1:
        return x
    wide = torch.full((tokens, heads, size + 8), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., :size] = x
    return wide[..., :size]


def errors(case: Case, dtype: torch.dtype, way: int) -> dict[str, float]:
    """Of output and gradients, how often something else was chosen than by loops, and the coverage."""
    q, k, v, d_out = (spread(x.to(dtype), way) for x in case.tensors(dtype))
    ends, call = case.cu_seqlens(), (case.block, case.max_budget, case.scale)
    chosen, coverage = routed_blocks.route_blocks(q, k, ends, case.budget_on(), *call)
    loops, held = brute_choice(case, q.double(), k.double())
    mask = torch.zeros(*loops.shape[:2], loops.shape[2] + 1, dtype=torch.bool)
    mask.scatter_(2, torch.where(chosen < 0, loops.shape[2], chosen).long(), True)
    found = {"choice": float((mask[..., :-1] != loops).sum()), "coverage": abs(float(coverage) - held)}
    out, logsumexp = routed_attention.forward(q, k, v, ends, chosen, case.block, case.scale)
    saved = (d_out, out, logsumexp, q, k, v, ends, chosen, case.block, case.scale)
    given = dict(zip(("output", "d q", "d k", "d v"), (out, *routed_attention.backward(*saved)), strict=True))
    wanted = expected(case, mask_of(chosen, case.ends, case.block), dtype)
    return found | {name: ratio(given[name], value) for name, value in wanted.items()}


def interpret() -> dict[str, dict[str, float]]:
    """Errors of all cases; outputs and buffers start as NaN, and few tokens' parts are in memory at once."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    routed_rows._BYTES, routed_blocks._SCORES = 1, 1
    found = {}
    for number, (name, case) in enumerate(INTERPRETED.items()):
        for dtype in (torch.float32, torch.bfloat16) if name in IN_BFLOAT16 else (torch.float32,):
            found[f"{name}, {str(dtype).removeprefix('torch.')}"] = errors(case, dtype, number % 3)
    return found


def outside() -> dict[str, str]:
    """What is said of bad values, which the device alone can see."""
    case = Case(max_budget=64)
    q, k, *_ = (x.float() for x in case.tensors(torch.float32))
    calls: dict[str, tuple[Any, Any]] = {
        "long sequence": (torch.tensor((0, 130, 100)), case.budget_on()),
        "small budget": (case.cu_seqlens(), torch.tensor(16)),
        "large budget": (case.cu_seqlens(), torch.tensor(65)),
    }
    found = {}
    for name, (ends, budget) in calls.items():
        try:
            found[name] = str(routed_blocks.route_blocks(q, k, ends, budget, 16, 64, 0.3))
        except RuntimeError as error:
            found[name] = str(error)
    return found


COMPILED = {
    "bfloat16": (Case((0, 131072), 32, 8, 128, 128, 256, 4096, 4096), torch.bfloat16),
    "small blocks": (Case((0, 70000, 131072), 28, 4, 64, 64, 64, 4096, 8192), torch.bfloat16),
    "latents": (Case((0, 32768), 16, 16, 192, 128, 128, 4096, 4096), torch.float16),
    "wide": (Case((0, 32768), 8, 1, 256, 256, 256, 4096, None), torch.bfloat16),
    "float32": (Case((0, 4096), 8, 2, 256, 256, 128, 1024, 1024), torch.float32),
}


def compile_one(kind: str, room: int = 227 << 10) -> dict[str, int]:
    """Bytes of shared memory of each kernel of one kind of call, on a device that has `room`."""
    from offline_kernels import compile_instead

    routed_rows.shared_memory = lambda device: room
    kernels = ("_means", "_score", "_select", "_count", "_place", "_attend", "_merge", "_delta", "_query_gradient",
               "_sum", "_key_gradient", "_add_pieces")  # fmt: skip
    modules = (routed_blocks, routed_index, routed_attention, routed_gradient, routed_rows)
    launches = compile_instead(modules, kernels)
    case, dtype = COMPILED[kind]
    with torch.device("meta"):
        q, k, v, d_out = (
            torch.empty(case.tokens, heads, size, dtype=dtype)
            for heads, size in (
                (case.heads, case.key_size), (case.groups, case.key_size), (case.groups, case.value_size),
                (case.heads, case.value_size),
            )
        )  # fmt: skip
        ends, budget = torch.empty(len(case.ends), dtype=torch.int32), torch.empty((), dtype=torch.int32)
    assert routed_blocks.supported(q, k, len(case.ends) - 1, case.block)
    chosen, _ = routed_blocks.route_blocks(q, k, ends, budget, case.block, case.max_budget, case.scale)
    assert routed_attention.supported(q, k, v, chosen, case.scale)
    out, logsumexp = routed_attention.forward(q, k, v, ends, chosen, case.block, case.scale)
    routed_attention.backward(d_out, out, logsumexp, q, k, v, ends, chosen, case.block, case.scale)
    return dict(launches)


if __name__ == "__main__":
    if sys.argv[1] != "compile":
        from triton_interpreter import check_accesses, correct_bfloat16, set_up

        set_up()
        correct_bfloat16()
        check_accesses()
        assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads TRITON_INTERPRET when it is imported"
        print(json.dumps({"interpret": interpret, "outside": outside}[sys.argv[1]]()))
    else:
        print(json.dumps(compile_one(sys.argv[2], *map(int, sys.argv[3:]))))
