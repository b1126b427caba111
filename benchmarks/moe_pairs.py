"""The library's grouped product at and beyond whole pairs of tiles (256 rows of an expert), for area `moe`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.backend import _free
from benchmarks.rows import Row, row, seconds_a_call
from effpass.lowering.ops.moe_ffn_choice import run_kernel
from effpass.lowering.ops.moe_ffn_cost import Shape
from effpass.lowering.ops.moe_ffn_fit import random_layer

__all__ = ["even_routings", "pairs"]

AREA = "moe"
GATE = ("silu", 1.0, 0.0, 0.0, False)
#: Experts as large as Mixtral's and as DeepSeek-V2's.
LAYERS = (Shape(2, 8, 4096, 14336), Shape(4, 160, 5120, 1536))
ROWS = (192, 256, 264, 320, 384, 392, 448, 512, 520)
RUNS = 5


def even_routings(shape: Shape, rows: int, count: int, device: str) -> Tensor:
    """Routings [count, T, k] in which every expert has exactly `rows` rows: its group of k occurs as often."""
    groups = torch.arange(shape.experts, device=device).view(-1, shape.each)
    return torch.stack(
        [groups.repeat(rows, 1)[torch.randperm(len(groups) * rows, device=device)] for _ in range(count)]
    )


def pairs(device: str, smoke: bool) -> Iterator[Row]:
    """Both products alone, against a layer with tiles of 128 rows, not in pairs; notes have the library's layer."""
    if device != "cuda":
        return
    for shape in LAYERS:
        with torch.inference_mode():
            gate_up, down = random_layer(shape, torch.device(device), torch.bfloat16)
            for rows in ROWS:
                yield _row(shape, rows, gate_up, down, device)
        del gate_up, down
        _free(device)


def _row(shape: Shape, rows: int, gate_up: Tensor, down: Tensor, device: str) -> Row:
    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device, dtype=gate_up.dtype)

    ids = even_routings(shape, rows, 2, device)
    x, weights = random(ids.shape[1], shape.width), torch.rand(ids.shape[1:], device=device).softmax(-1)

    def layer(kernel: str) -> float:
        def call(turn: int) -> Tensor:
            return run_kernel(kernel, x, ids[turn], weights, gate_up, None, down, None, *GATE)

        return seconds_a_call(call, 2, captured=True, runs=RUNS) * 1e6

    ends = torch.arange(1, shape.experts + 1, device=device, dtype=torch.int32) * rows

    def product(a: Tensor, weight: Tensor) -> float:
        def call(turn: int) -> Tensor:
            return torch._grouped_mm(a, weight.transpose(1, 2), ends)

        return seconds_a_call(call, 2, captured=True, runs=RUNS) * 1e6

    first = product(random(shape.experts * rows, shape.width), gate_up)
    second = product(random(shape.experts * rows, shape.inner), down)
    case = f"{shape.experts} experts of {shape.width} x {shape.inner}, {rows} rows for each"
    return row(
        AREA, case, "the library's two grouped products", first + second, "us", device=device,
        peer=layer("grouped128"), peer_name="grouped128, whole layer", runs=RUNS,
        note=f"whole layer with the library {layer('library'):.0f} us; products {first:.0f} and {second:.0f} us",
    )  # fmt: skip
