"""What a token's kernels take, apart from the model around them: the layers of a small model in one CUDA graph.

Each row changes one thing. Where kernels of a microsecond wait for each other, the ways to be faster are to overlap
their starts, to give them another shape, or to have fewer of them: the last two rows are what a launch, and what a
barrier between all programs of one kernel, cost without any work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.rows import Row, bandwidth, measure, row

AREA = "decode"
LAYERS, HIDDEN, INNER, HEADS, GROUPS, HEAD, SLOTS, FILLED = 30, 576, 1536, 9, 3, 64, 1024, 592


def chain(device: str, smoke: bool) -> Iterator[Row]:
    """SmolLM2's layers at batch 1, and what changes when one thing does."""
    if device != "cuda":
        return
    from effpass.lowering.kernels import decode_attention, launch, small_linear

    shape = small_linear.one_row_shape

    def shaped(outputs: float, warps: float) -> Callable[..., dict[str, int]]:
        def changed(*args: Any) -> dict[str, int]:
            found = shape(*args)
            found["BLOCK_N"] = max(1, int(found["BLOCK_N"] * outputs))
            found["num_warps"] = max(1, int(found["num_warps"] * warps))
            return found

        return changed

    tile, count = decode_attention.tile_shape, decode_attention.split_count

    @contextmanager
    def attending(slots: int, warps: int, most: int) -> Iterator[None]:
        def tiled(*args: Any) -> dict[str, int]:
            return {**tile(*args), "BLOCK_N": slots, "num_warps": warps}

        with (
            patch.object(decode_attention, "tile_shape", tiled),
            patch.object(decode_attention, "split_count", lambda *args: min(most, count(*args))),
        ):
            yield

    @contextmanager
    def one_after_the_other() -> Iterator[None]:
        with (
            patch.object(launch, "overlaps", lambda device: False),
            patch.object(small_linear, "overlaps", lambda device: False),
            patch.object(decode_attention, "overlaps", lambda device: False),
        ):
            yield

    variants: dict[str, Any] = {
        "as released": None,
        "each kernel after the end of the one before (no dependent launch)": one_after_the_other(),
        "linears with half the outputs a program": patch.object(small_linear, "one_row_shape", shaped(0.5, 1)),
        "linears with twice the outputs a program": patch.object(small_linear, "one_row_shape", shaped(2, 1)),
        "linears with twice the warps": patch.object(small_linear, "one_row_shape", shaped(1, 2)),
        "linears with half the warps": patch.object(small_linear, "one_row_shape", shaped(1, 0.5)),
        "attention by one program a head, tiles of 128 slots": attending(128, 8, 1),
        "attention by one program a head, tiles of 256 slots": attending(256, 8, 1),
        "attention by at most 3 programs a head, tiles of 256 slots": attending(256, 8, 3),
        "attention by at most 5 programs a head, tiles of 128 slots": attending(128, 4, 5),
    }
    layers = [_Layer() for _ in range(2 if smoke else LAYERS)]
    read = sum(layer.bytes for layer in layers)
    bound = read / bandwidth(device) * 1e3
    for name, change in variants.items():
        if change is None:
            graph = _captured(lambda: _run(layers, "1234"))
        else:
            with change:
                graph = _captured(lambda: _run(layers, "1234"))
        yield _row(f"{LAYERS} layers of SmolLM2: {name}", graph, bound)
    for left, name in (("234", "without attention"), ("1", "attention alone"), ("34", "gate, up and down alone")):
        yield _row(f"{LAYERS} layers of SmolLM2: {name}", _captured(partial(_run, layers, left)), None)
    x = torch.zeros(132, device=device)
    yield _row("150 empty kernels of 132 programs, dependent launch", _captured(lambda: _nothing(x)), None)
    yield _row("one kernel with 150 barriers of 132 programs", _captured(lambda: _barriers(x)), None)


def _row(case: str, call: Callable[[], Any], bound: float | None) -> Row:
    timing = measure(call, "cuda", warmup=10, runs=15, inner=20)
    return row(AREA, case, "one CUDA graph", timing.median * 1e3, "ms", device="cuda", bound=bound, runs=15)


def _captured(call: Callable[[], None]) -> Callable[[], Any]:
    from effpass.runtime.cuda_graph import record

    return record(call, warm_up=call).replay


class _Layer:
    """Weights and cache of one layer of SmolLM2."""

    def __init__(self) -> None:
        of: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}

        def weight(outputs: int, inputs: int) -> Tensor:
            return torch.randn(outputs, inputs, **of) * inputs**-0.5

        self.norms = [torch.ones(HIDDEN, **of) for _ in range(2)]
        self.qkv = [weight(heads * HEAD, HIDDEN) for heads in (HEADS, GROUPS, GROUPS)]
        self.out = weight(HIDDEN, HEADS * HEAD)
        self.gate, self.up, self.down = weight(INNER, HIDDEN), weight(INNER, HIDDEN), weight(HIDDEN, INNER)
        self.keys, self.values = (torch.randn(1, GROUPS, SLOTS, HEAD, **of) for _ in range(2))
        weights = (*self.qkv, self.out, self.gate, self.up, self.down)
        cached = 2 * GROUPS * FILLED * HEAD
        self.bytes = 2 * (sum(w.numel() for w in weights) + cached)


@cache
def _inputs() -> tuple[Any, ...]:
    of: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x, attended, inner = (torch.ones(1, 1, size, **of) for size in (HIDDEN, HEADS * HEAD, INNER))
    heads = [torch.ones(1, 1, count, HEAD, **of) for count in (HEADS, GROUPS, GROUPS)]
    positions = torch.arange(SLOTS, device="cuda", dtype=torch.int32)[None]
    start = torch.full((1,), FILLED, device="cuda", dtype=torch.int32)
    return x, attended, inner, torch.ones(1, 1, HEAD, **of), heads, positions, start


def _run(layers: list[_Layer], parts: str) -> None:
    """Parts: 1 attention, 2 the projections around it, 3 gate and up, 4 down."""
    from effpass.lowering.kernels.decode_attention import rope_cached_attention
    from effpass.lowering.kernels.small_linear import fused_linear, gated_linear

    x, attended, inner, turn, heads, positions, start = _inputs()
    for layer in layers:
        if "2" in parts:
            made = fused_linear(x, layer.qkv, [None] * 3, layer.norms[0], 1e-5, 0.0, None)
            heads = [t.view(1, 1, -1, HEAD) for t in made]
        if "1" in parts:
            attended = rope_cached_attention(
                heads[0], heads[1], heads[2], turn, turn, None, None, 0.0, 0.0, layer.keys, layer.values, positions,
                start[:, None], start, HEAD**-0.5, 0, 0.0,
            ).view(1, 1, -1)  # fmt: skip
        if "2" in parts:
            (x,) = fused_linear(attended, [layer.out], [None], None, 0.0, 0.0, x)
        if "3" in parts:
            inner = gated_linear(x, layer.gate, layer.up, layer.norms[1], 1e-5, 0.0, "silu")
        if "4" in parts:
            (x,) = fused_linear(inner, [layer.down], [None], None, 0.0, 0.0, x)


# -- launches and barriers without work --------------------------------------------------------------------------------


def _nothing(x: Tensor) -> None:
    from benchmarks.empty_kernels import nothing
    from effpass.lowering.kernels.launch import launch_options

    for _ in range(150):
        nothing[(132,)](x, **launch_options(x.device, 4))


def _barriers(x: Tensor) -> None:
    from benchmarks.empty_kernels import barriers

    barriers[(132,)](torch.zeros(1, dtype=torch.int32, device=x.device), x, COUNT=150, num_warps=4)
