"""`effpass::moe_ffn` for many tokens by matrix products of PyTorch's libraries, with Triton kernels around them.

    route → gather rows → product → gate → product → weighted sum

Each of the other steps is one kernel launch. A product is a single grouped call (`torch._grouped_mm`) or, where the
rows of one expert fill the device, one call per expert. The latter needs the number of rows per expert on the host, and
is the only kernel of `effpass::moe_ffn` that waits for the device. The projection and h are rounded to the dtype of x;
the gate and the weighted sum are computed in float32.
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
    """Return whether grouped products that do not wait for the device support these tensors."""
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
    """Run `effpass::moe_ffn` without returning the projection, on tensors that `moe_grouped.moe_ffn` accepts.

    Args:
        by_expert: whether to call one product per expert, after waiting for the number of rows of each.
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
    """Compute the outputs of pairs, not yet multiplied by router weights, sorted by expert.

    Arguments not listed are those of `moe_grouped.products`.

    Args:
        ends: int32 [E], end of the pairs of each of these experts, counted from the first pair of the first expert.
        bounds: `ends` on the host, preceded by 0, for one product per expert; None for grouped products.
        pairs: maximum number of pairs of these experts.

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
    """Return launch options without dependent launch, which the library kernels before and after do not use."""
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
