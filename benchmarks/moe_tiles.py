"""Other tiles of the grouped kernels, for area `moe`: the loads at which no tile is the fastest for every routing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.backend import _free
from benchmarks.rows import Row, row, seconds_a_call
from effpass.lowering.ops.kernel_choice import triton_kernels
from effpass.lowering.ops.moe_ffn_cost import Shape
from effpass.lowering.ops.moe_ffn_fit import random_layer

__all__ = ["tiles"]

AREA = "moe"
GATE = ("silu", 1.0, 0.0, 0.0, False)
Routings = Callable[[Shape, int, int, bool, str], tuple[Tensor, Tensor]]


def _variants(kernels: Any) -> dict[str, Any]:
    """Tiles by a description; the kernels' own begin with `tiles of`."""
    pairs = {rows: kernels.TILES[f"grouped{rows}"][0] for rows in (16, 32, 64, 128)}
    (first, second), (first32, second32) = pairs[64], pairs[32]
    deep = kernels.TILES["mixed64"][1]  # as vLLM has them for 256 rows in 8 experts
    alone = {
        # More programs per multiprocessor: the last wave takes a smaller part of the time.
        "64 rows, 3 stages": (replace(first, stages=3), replace(second, stages=3)),
        "64 rows, 3 stages in the second product": (first, replace(second, stages=3)),
        "64 rows, 64 columns in the second product": (first, replace(second, columns=64)),
        "64 rows, then 32": (first, second32),
        "32 rows, then 64": (first32, second),
        "64 rows, depth 128, eight warps": deep,
        "64 rows, depth 128, eight warps in the first product": (deep[0], second),
        "128 rows, 3 stages": tuple(replace(of, stages=3) for of in pairs[128]),
        "128 rows, programs of many tiles": tuple(replace(of, resident=1) for of in pairs[128]),
    }
    mixed = {
        "16 rows, others 32": (pairs[16], pairs[32]),
        "32 rows, others 64": (pairs[32], pairs[64]),
        "32 rows, others 128": (pairs[32], pairs[128]),
        "64 rows, depth 128, eight warps, others 128": (deep, pairs[128]),
        "32 rows, others 64, others 128": (pairs[32], pairs[64], pairs[128]),
    }
    own = {f"tiles of {rows} rows": (of,) for rows, of in pairs.items()}
    own["tiles of 32 rows, others 64, depth 128, eight warps"] = kernels.TILES["mixed64"]
    own["tiles of 64 rows, others 128"] = kernels.TILES["mixed128"]
    return own | {variant: (of,) for variant, of in alone.items()} | mixed


def tiles(loads: tuple[tuple[str, Shape, int], ...], routings: Routings, device: str, smoke: bool) -> Iterator[Row]:
    """Time every variant on every load (name, layer, tokens), even and skewed, against the fastest of the own tiles."""
    kernels = triton_kernels("moe_grouped")
    if device != "cuda" or kernels is None:
        return
    for name, shape, tokens in loads:
        with torch.inference_mode():
            gate_up, down = random_layer(shape, torch.device(device), torch.bfloat16)
        for routing, skewed in (("even", False), ("skewed", True)):
            ids, weights = routings(shape, tokens, 4, skewed, device)
            x = torch.randn(tokens, shape.width, device=device, dtype=torch.bfloat16)
            with torch.inference_mode():
                seconds = _seconds(kernels, x, ids, weights, gate_up, down)
            own = min((v for v in seconds if v.startswith("tiles of")), key=lambda v, of=seconds: of[v])  # type: ignore[misc]
            for variant, taken in seconds.items():
                yield row(
                    AREA, f"{name}, {tokens} tokens, {routing}", f"layer of experts, {variant}", taken * 1e6, "us",
                    device=device, peer=seconds[own] * 1e6, peer_name=own, runs=7,
                )  # fmt: skip
        del gate_up, down
        _free(device)


def _seconds(kernels: Any, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> dict[str, float]:
    def timed(of: Any) -> float:
        def call(turn: int) -> Tensor:
            return kernels.moe_ffn(x, ids[turn], weights, gate_up, None, down, None, *GATE, of)

        return seconds_a_call(call, len(ids), captured=True)

    return {name: timed(of) for name, of in _variants(kernels).items() if kernels.fits(of, x.device)}
