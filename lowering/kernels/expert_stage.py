"""Triton kernels for one stage of `effpass::expert_parallel`: experts on the received rows, and the sums that return.

They compute what :mod:`effpass.lowering.ops.expert_parallel_stage` defines. The matrix products are those of
`effpass::moe_ffn` (:mod:`effpass.lowering.kernels.moe_grouped` and :mod:`effpass.lowering.kernels.moe_library`). The
kernel is chosen by the load of each stage, which is known on the host, so that even one product per expert does not
wait for the device. `_sums` adds the weighted outputs of each row's pairs in float32, in their order, with one program
per row and up to 1024 columns, and rounds once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effpass.lowering.kernels import moe_grouped, moe_library
from effpass.lowering.kernels.moe_library import plain_options
from effpass.lowering.kernels.moe_route import combine
from effpass.lowering.ops.expert_parallel_routes import Pairs, Plan, Summary
from effpass.lowering.ops.expert_parallel_stage import Experts

__all__ = ["compute", "sums", "total"]


def compute(
    x: Tensor, column: int, pairs: Pairs, plan: Plan, stage: int, experts: Experts, outputs: Tensor, kernel: str
) -> None:
    """Same as `expert_parallel_stage.compute`, with one of several kernels.

    `kernel` is a name of :data:`~effpass.lowering.ops.expert_parallel_cost.STAGE_KERNELS`.
    """
    first, last = stage * plan.size, (stage + 1) * plan.size
    bounds = [0, *plan.ends][first : last + 1]
    count = bounds[-1] - bounds[0]
    if not count:
        return
    some = experts.some(first, last)
    reads, starts = pairs.words[:, column], pairs.starts[first : last + 1]
    biases = [None if b is None else b.contiguous() for b in (some.gate_up_bias, some.down_bias)]
    layer = (some.gate_up, biases[0], some.down, biases[1], *experts.gate)
    of_pairs = (x, reads, pairs.words.shape[1], pairs.order, starts)
    if kernel in ("library", "by_expert"):
        own = [bound - bounds[0] for bound in bounds] if kernel == "by_expert" else None
        done = moe_library.products(*of_pairs, starts[1:] - starts[0], own, count, *layer)
        outputs.index_copy_(0, pairs.order[bounds[0] : bounds[-1]].long(), done)
        return
    tiles = moe_grouped.TILES[kernel]
    moe_grouped.products(*of_pairs, count, tiles, outputs, *layer)


def sums(outputs: Tensor, pairs: Pairs, rows: slice, each: int) -> Tensor:
    """Same as `expert_parallel_stage.sums`."""
    count, width = rows.stop - rows.start, outputs.shape[1]
    out = outputs.new_empty(count, width)
    if count:
        block = min(triton.next_power_of_2(width), 1024)
        _sums[(triton.cdiv(width, block), count)](
            outputs, pairs.words, pairs.begin, pairs.end, out, rows.start, WIDTH=width, BLOCK=block,
            **plain_options(outputs.device, max(1, block // 256)),
        )  # fmt: skip
    return out


def total(regained: Tensor, summary: Summary, back: Tensor, local: int) -> Tensor:
    """Same as `expert_parallel_stage.total`."""
    out = regained.new_empty(back.shape[0], regained.shape[1])
    if back.shape[0]:
        ones = torch.ones(back.shape, dtype=torch.float32, device=back.device)
        combine(regained, summary.first, ones, local, out, back)
    return out


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["first"])
def _sums(outputs, words, begin, end, out, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    n, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    total = tl.zeros([BLOCK], tl.float32)
    pair, last = tl.load(begin + first + row), tl.load(end + first + row)
    outputs += pair.to(tl.int64) * WIDTH
    words += pair.to(tl.int64) * 4 + 3
    for at in range(0, last - pair):
        weight = tl.load(words + at * 4).to(tl.float32, bitcast=True)
        total += weight * tl.load(outputs + at * WIDTH + n, mask=n < WIDTH, other=0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * WIDTH + n, total.to(out.dtype.element_ty), mask=n < WIDTH)
