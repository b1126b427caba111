"""Experts of many tokens by the library's matrix products, with what surrounds them in one launch each.

    route → gather rows → product → gate → product → weighted sum

The products are one grouped call of the library, or, where the rows of an expert fill the device, one call an expert.
The latter needs to know on the host how many rows each has: the one place where a layer of experts waits for a device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effpass.lowering.kernels.launch import launch_options
from effpass.lowering.kernels.moe_gate import gate
from effpass.lowering.kernels.moe_route import combine, route
from effpass.lowering.ops.moe_ffn_grouped import Groups, linear, takes

__all__ = ["moe_ffn", "plain_options", "products", "supported"]


def supported(x: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Whether the library has a grouped product that waits for nobody."""
    return takes(x, gate_up) and takes(x, down)


def moe_ffn(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    offset: float,
    interleaved: bool,
    *,
    by_expert: bool,
) -> Tensor:
    """`effpass::moe_ffn` without the projection, for tensors as `moe_grouped.moe_ffn` takes them.

    Args:
        by_expert: one product an expert, after waiting for the number of rows of each.
    """
    each, count = experts.shape[1], down.shape[0]
    places = experts.new_empty(experts.numel(), dtype=torch.int32)
    order, starts = route(experts, count, places)
    bounds = starts.tolist() if by_expert else None
    gate = (activation, alpha, limit, offset, interleaved)
    outputs = products(
        x, None, each, order, starts, starts[1:], bounds, experts.numel(), gate_up, gate_up_bias, down, down_bias, *gate
    )
    return combine(outputs, experts, weights, count, x.new_empty(x.shape), places)


def products(
    x: Tensor,
    reads: Tensor | None,
    each: int,
    order: Tensor,
    starts: Tensor,
    ends: Tensor,
    bounds: list[int] | None,
    pairs: int,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    offset: float,
    interleaved: bool,
) -> Tensor:
    """The outputs of sorted pairs, without their weights, sorted.

    Args:
        x: this and what follows up to `starts` as in `moe_grouped.products`.
        ends: int32 [E], where the pairs of each of these experts end, from the first of them on.
        bounds: the same on the host, from 0 on, for one product an expert; None for a grouped one.
        pairs: how many they are at most.
        gate_up: this and what follows as in :func:`moe_ffn`.

    Returns:
        [pairs, D].
    """
    (count, width, inner), device = down.shape, x.device
    rows, hidden = x.new_empty(pairs, width), x.new_empty(pairs, inner)
    block = min(triton.next_power_of_2(width), 1024)
    _gather[(pairs, triton.cdiv(width, block))](
        x, reads, order, starts, rows, each, COUNT=count, WIDTH=width, BLOCK=block,
        **plain_options(device, max(1, block // 256)),
    )  # fmt: skip
    groups = Groups(order, ends, bounds)
    projected = linear(rows, gate_up, gate_up_bias, groups)
    block = min(triton.next_power_of_2(inner), 1024)
    _gate[(pairs, triton.cdiv(inner, block))](
        projected, starts, hidden, alpha, limit, offset, COUNT=count, INNER=inner, ACTIVATION=activation,
        LIMITED=limit != 0, INTERLEAVED=interleaved, BLOCK=block, **plain_options(device, max(1, block // 256)),
    )  # fmt: skip
    return linear(hidden, down, down_bias, groups)


def plain_options(device: torch.device, num_warps: int) -> dict[str, Any]:
    """Launch options without overlap: the library's kernels on either side know nothing of it."""
    return {**launch_options(device, num_warps), "launch_pdl": False} if device.type == "cuda" else {}


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["each"], do_not_specialize_on_alignment=["starts"])
def _gather(
    x, reads, order, starts, rows, each, COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, n = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(starts) + row
    if place < tl.load(starts + COUNT):
        pair = tl.load(order + place)
        source = pair // each if reads is None else tl.load(reads + pair * each)
        value = tl.load(x + source.to(tl.int64) * WIDTH + n, mask=n < WIDTH)
        tl.store(rows + row.to(tl.int64) * WIDTH + n, value, mask=n < WIDTH)


@triton.jit(do_not_specialize_on_alignment=["starts"])
def _gate(
    projected, starts, hidden, alpha, limit, offset, COUNT: tl.constexpr, INNER: tl.constexpr,
    ACTIVATION: tl.constexpr, LIMITED: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, n = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if row < tl.load(starts + COUNT) - tl.load(starts):
        projected += row.to(tl.int64) * 2 * INNER
        of_gate = n * 2 if INTERLEAVED else n
        of_up = n * 2 + 1 if INTERLEAVED else n + INNER
        g = tl.load(projected + of_gate, mask=n < INNER, other=0).to(tl.float32)
        u = tl.load(projected + of_up, mask=n < INNER, other=0).to(tl.float32)
        h = gate(g, u, alpha, limit, offset, ACTIVATION, LIMITED)
        tl.store(hidden + row.to(tl.int64) * INNER + n, h.to(hidden.dtype.element_ty), mask=n < INNER)
