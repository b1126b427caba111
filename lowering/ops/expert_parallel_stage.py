"""The experts of one stage on the rows that are here, and the sums that go back; plain PyTorch, on any device.

GPUs have kernels for this (:mod:`effpass.lowering.kernels.expert_stage`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effpass.lowering.ops.expert_parallel_routes import Pairs, Plan, Summary
from effpass.lowering.ops.moe_ffn import gated
from effpass.lowering.ops.moe_ffn_grouped import Groups, linear

__all__ = ["Experts", "compute", "sums", "total"]


@dataclass(frozen=True)
class Experts:
    """Local experts; see `effpass::moe_ffn` for what each is.

    Attributes:
        gate: activation, α, limit, offset, interleaved.
    """

    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    gate: tuple[Any, ...]

    def some(self, begin: int, end: int) -> Experts:
        """Experts begin … end - 1."""
        biases = (None if b is None else b[begin:end] for b in (self.gate_up_bias, self.down_bias))
        first, second = biases
        return Experts(self.gate_up[begin:end], first, self.down[begin:end], second, self.gate)


def compute(
    x: Tensor, column: int, pairs: Pairs, plan: Plan, stage: int, experts: Experts, outputs: Tensor, kernel: str = ""
) -> None:
    """The outputs of a stage's pairs.

    Args:
        x: [R, D].
        column: of `Pairs.words`, which row of x each pair reads.
        pairs: of all stages.
        plan: of all stages.
        stage: which one.
        experts: all that are here.
        outputs: [P, D]; written where the stage's pairs stand.
        kernel: of those for a GPU; here it is one product an expert.
    """
    first, last = stage * plan.size, (stage + 1) * plan.size
    bounds = [0, *plan.ends][first : last + 1]
    order = pairs.order[bounds[0] : bounds[-1]]
    bounds = [bound - bounds[0] for bound in bounds]
    groups = Groups(order, pairs.starts[first + 1 : last + 1] - pairs.starts[first], bounds)
    some = experts.some(first, last)
    rows = x[pairs.words[order, column].long()]
    hidden = gated(linear(rows, some.gate_up, some.gate_up_bias, groups), *experts.gate)
    outputs[order] = linear(hidden, some.down, some.down_bias, groups)


def sums(outputs: Tensor, pairs: Pairs, rows: slice, each: int) -> Tensor:
    """Σ weights · outputs over the pairs of each row, in the order in which its token names them: [n, D].

    Args:
        outputs: [P, D].
        pairs: of all stages.
        rows: which, of all rows that go back.
        each: k, the most pairs that a row has.
    """
    place = pairs.begin[rows].unsqueeze(1) + torch.arange(each, device=outputs.device)
    inside = place < pairs.end[rows].unsqueeze(1)
    place = torch.where(inside, place, 0)
    return _weighted(outputs, place, inside, pairs.weights[place])


def total(regained: Tensor, summary: Summary, back: Tensor, local: int) -> Tensor:
    """What came back for each token, rank by rank: [T, D].

    Args:
        regained: [R, D].
        summary: of the tokens, which says what ranks they have a row at.
        back: [T, W], the row of `regained` from each rank.
        local: L.
    """
    here = summary.first < local
    if not regained.shape[0]:
        return regained.new_zeros(back.shape[0], regained.shape[1])
    return _weighted(regained, back.clamp(min=0), here, here)


def _weighted(values: Tensor, place: Tensor, inside: Tensor, weights: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(values.dtype, weights.dtype), torch.float32)
    # A place that holds nothing may hold anything, NaN included.
    return torch.where(inside.unsqueeze(-1), values[place] * weights.to(wide).unsqueeze(-1), 0).sum(1).to(values.dtype)
