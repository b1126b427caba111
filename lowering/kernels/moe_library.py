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

__all__ = ["moe_ffn", "supported"]


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
    (tokens, width), each, (count, _, inner) = x.shape, experts.shape[1], down.shape
    pairs = tokens * each
    places = experts.new_empty(pairs, dtype=torch.int32)
    order, starts = route(experts, count, places)
    rows, hidden = x.new_empty(pairs, width), x.new_empty(pairs, inner)
    block = min(triton.next_power_of_2(width), 1024)
    _gather[(pairs, triton.cdiv(width, block))](
        x, order, starts, rows, each, COUNT=count, WIDTH=width, BLOCK=block,
        **_plain(x.device, max(1, block // 256)),
    )  # fmt: skip
    groups = Groups(order, starts[1:], starts.tolist() if by_expert else None)
    projected = linear(rows, gate_up, gate_up_bias, groups)
    block = min(triton.next_power_of_2(inner), 1024)
    _gate[(pairs, triton.cdiv(inner, block))](
        projected, starts, hidden, alpha, limit, offset, COUNT=count, INNER=inner, ACTIVATION=activation,
        LIMITED=limit != 0, INTERLEAVED=interleaved, BLOCK=block, **_plain(x.device, max(1, block // 256)),
    )  # fmt: skip
    outputs = linear(hidden, down, down_bias, groups)
    return combine(outputs, experts, weights, count, x.new_empty(x.shape), places)


def _plain(device: torch.device, num_warps: int) -> dict[str, Any]:
    """Launch options without overlap: the library's kernels on either side know nothing of it."""
    return {**launch_options(device, num_warps), "launch_pdl": False} if device.type == "cuda" else {}


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["each"])
def _gather(
    x, order, starts, rows, each, COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, n = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if row < tl.load(starts + COUNT):
        token = (tl.load(order + row) // each).to(tl.int64)
        value = tl.load(x + token * WIDTH + n, mask=n < WIDTH)
        tl.store(rows + row.to(tl.int64) * WIDTH + n, value, mask=n < WIDTH)


@triton.jit
def _gate(
    projected, starts, hidden, alpha, limit, offset, COUNT: tl.constexpr, INNER: tl.constexpr,
    ACTIVATION: tl.constexpr, LIMITED: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, n = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if row < tl.load(starts + COUNT):
        projected += row.to(tl.int64) * 2 * INNER
        of_gate = n * 2 if INTERLEAVED else n
        of_up = n * 2 + 1 if INTERLEAVED else n + INNER
        g = tl.load(projected + of_gate, mask=n < INNER, other=0).to(tl.float32)
        u = tl.load(projected + of_up, mask=n < INNER, other=0).to(tl.float32)
        h = gate(g, u, alpha, limit, offset, ACTIVATION, LIMITED)
        tl.store(hidden + row.to(tl.int64) * INNER + n, h.to(hidden.dtype.element_ty), mask=n < INNER)
