"""Computation of one stage of an expert-parallel layer: the experts on the received rows, and the sums that return.

This is plain PyTorch for any device; GPUs have kernels in :mod:`effpass.lowering.kernels.expert_stage`. Rows, pairs and
stages are defined in :mod:`effpass.lowering.ops.expert_parallel_routes`.
"""

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
    """Weights of local experts; see `effpass::moe_ffn` for their shapes.

    Attributes:
        gate: activation, alpha, limit, offset and interleaved, as in `effpass::moe_ffn`.
    """

    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    gate: tuple[Any, ...]

    def some(self, begin: int, end: int) -> Experts:
        """Return experts begin … end - 1, as views."""
        biases = (None if b is None else b[begin:end] for b in (self.gate_up_bias, self.down_bias))
        first, second = biases
        return Experts(self.gate_up[begin:end], first, self.down[begin:end], second, self.gate)


def compute(
    x: Tensor, column: int, pairs: Pairs, plan: Plan, stage: int, experts: Experts, outputs: Tensor, kernel: str = ""
) -> None:
    """Compute the outputs of a stage's pairs.

    Args:
        x: [R, D], hidden states.
        column: column of `Pairs.words` that tells which row of `x` a pair reads.
        pairs: pairs of all stages.
        plan: plan of all stages.
        stage: index of the stage.
        experts: all local experts.
        outputs: [P, D]; the pairs of this stage are written.
        kernel: name of a GPU kernel; unused here, where every expert is one matrix product.
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
    """Return the weighted sums of the outputs of each row's pairs, [n, D], in the order in which tokens list experts.

    Args:
        outputs: [P, D].
        pairs: pairs of all stages.
        rows: which of all returning rows to sum.
        each: maximum number of pairs per row, k.
    """
    place = pairs.begin[rows].unsqueeze(1) + torch.arange(each, device=outputs.device)
    inside = place < pairs.end[rows].unsqueeze(1)
    place = torch.where(inside, place, 0)
    return _weighted(outputs, place, inside, pairs.weights[place])


def total(regained: Tensor, summary: Summary, back: Tensor, local: int) -> Tensor:
    """Add up the sums that came back for each token, in the order of ranks; returns [T, D].

    Args:
        regained: [R, D], returned sums.
        summary: summary of the tokens, which tells the ranks that each token was sent to.
        back: [T, W], row of `regained` for each rank.
        local: number of experts per rank, L.
    """
    here = summary.first < local
    if not regained.shape[0]:
        return regained.new_zeros(back.shape[0], regained.shape[1])
    return _weighted(regained, back.clamp(min=0), here, here)


def _weighted(values: Tensor, place: Tensor, inside: Tensor, weights: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(values.dtype, weights.dtype), torch.float32)
    # Unused places may hold any value, including NaN.
    return torch.where(inside.unsqueeze(-1), values[place] * weights.to(wide).unsqueeze(-1), 0).sum(1).to(values.dtype)
