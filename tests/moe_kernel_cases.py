"""Kernels of experts against float64, pair by pair: on a GPU, or, run as a program, without one.

`python moe_kernel_cases.py interpret` computes float32 cases through Triton's interpreter; `... compile` compiles the
kernels at the sizes of real layers for a GPU that is not there. Both print JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from moe_reference import GATES, error, layer, moe_ffn
from offline_kernels import compile_instead
from triton_interpreter import set_up

# tokens, experts a token, experts, width, inner width; how; gate
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any], str]] = {
    "one token": ((1, 2, 5, 40, 24), {}, "SwiGLU"),
    "one token, biases, transposed": ((1, 3, 5, 72, 40), {"biases": True, "transposed": True}, "GPT-OSS"),
    "some tokens": ((19, 3, 5, 72, 40), {}, "SwiGLU"),
    "some tokens, biases": ((19, 3, 5, 72, 40), {"biases": True}, "GPT-OSS"),
    "some tokens, transposed": ((20, 2, 3, 64, 48), {"biases": True, "transposed": True}, "GPT-OSS"),
    "transposed halves": ((9, 2, 3, 64, 48), {"transposed": True}, "GELU"),
    "experts that are not here": ((18, 4, 3, 64, 40), {"absent": 3, "biases": True}, "GELU by tanh, limited"),
    "none of them here": ((3, 2, 1, 32, 16), {"absent": 40}, "SwiGLU"),
    "all to one expert": ((19, 1, 6, 48, 72), {"skewed": True}, "ReLU, interleaved"),
    "several steps": ((1, 2, 3, 600, 520), {}, "GELU"),
    "sizes that nothing divides": ((11, 2, 3, 37, 19), {"biases": True}, "SwiGLU"),
    "weights of another type": ((8, 2, 4, 64, 32), {"weights_dtype": torch.bfloat16}, "SwiGLU"),
}
KERNELS = ("rows", "grouped16", "grouped32", "grouped64", "grouped128", "mixed64", "mixed128", "by_expert")
INTERPRETED = (*KERNELS, "mixed from 2 rows")


def arguments(name: str, **of: Any) -> list[Any]:
    sizes, how, gate = CASES[name]
    made = layer(*sizes, **how, **of)
    if name == "none of them here":
        made[1].clamp_(min=1)
    return [*made, *GATES[gate]]


def errors(name: str, run: Callable[..., Any], kernels: tuple[str, ...] = KERNELS, **of: Any) -> dict[str, float]:
    """Error of each kernel in one case."""
    made = arguments(name, **of)
    expected = moe_ffn(*made)
    return {kernel: error(run(kernel, *made), expected) for kernel in kernels}


def interpret() -> dict[str, dict[str, float]]:
    """Errors of all cases in float32; outputs and buffers start as NaN. One kernel has programs of many tiles."""
    set_up()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills empty tensors with NaN
    grouped = importlib.import_module("effpass.lowering.kernels.moe_grouped")
    grouped.TILES["grouped128"] = (tuple(replace(tile, resident=1) for tile in grouped.TILES["grouped128"][0]),)
    choice = importlib.import_module("effpass.lowering.ops.moe_ffn_choice")
    # No expert of these cases has more than 32 rows, so that mixed kernels need no higher tiles; here, two rows do.
    low = tuple(replace(tile, rows=1) for tile in grouped.TILES["grouped64"][0])
    grouped.TILES["mixed from 2 rows"] = (low, *grouped.TILES["grouped64"])
    return {name: errors(name, choice.run_kernel, INTERPRETED) for name in CASES}


def compile_all() -> dict[str, int]:
    """Bytes of shared memory of each kernel, compiled for compute capability 9.0 at the sizes of real layers."""
    modules = [importlib.import_module(f"effpass.lowering.kernels.moe_{n}") for n in ("rows", "route", "grouped")]
    launches = compile_instead(modules, ("_first", "_second", "_route", "_combine", "_grouped"))
    rows, _, grouped = modules
    for sizes, how, gate in (
        ((1, 8, 128, 2048, 768), {}, "SwiGLU"),
        ((1, 4, 32, 2880, 2880), {"biases": True, "transposed": True}, "GPT-OSS"),
    ):
        tokens, each, experts, width, inner = sizes

        def weight(rows: int, columns: int, how: dict[str, bool] = how, experts: int = experts) -> torch.Tensor:
            turned = how.get("transposed", False)
            value = torch.empty((experts, columns, rows) if turned else (experts, rows, columns), dtype=torch.bfloat16)
            return value.transpose(1, 2) if turned else value

        for count in (tokens, 256):
            biases = [torch.empty(experts, n, dtype=torch.bfloat16) for n in (2 * inner, width)]
            biases = biases if how.get("biases") else [None, None]
            made = (
                torch.empty(count, width, dtype=torch.bfloat16), torch.zeros(count, each, dtype=torch.int64),
                torch.empty(count, each), weight(2 * inner, width), biases[0], weight(width, inner), biases[1],
            )  # fmt: skip
            if count == 1:
                rows.moe_ffn(*made, *GATES[gate])
                continue
            for tiles in grouped.TILES.values():
                grouped.moe_ffn(*made, *GATES[gate], tiles)
    return {f"{name}{number}": size for number, (name, size) in enumerate(launches)}


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads TRITON_INTERPRET when it is imported"
        print(json.dumps(interpret()))
    else:
        print(json.dumps(compile_all()))
