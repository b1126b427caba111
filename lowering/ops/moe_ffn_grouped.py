"""Matrix products of rows sorted by expert, each row with the weight of its expert, on any device.

    linear: out[p] = W_e a[p] + b_e        outer: out[e] = Σ_p a[p] b[p]ᵀ        over the rows p of expert e

On supported GPUs and dtypes (:func:`takes`) these are single calls of `torch._grouped_mm`, which do not wait for the
device. Otherwise there is one product per expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from effpass.core.errors import EffpassError

__all__ = ["Groups", "group", "linear", "outer", "takes"]


@dataclass(frozen=True)
class Groups:
    """Pairs of a token and an expert, sorted by expert, with pairs of no local expert at the end.

    Attributes:
        order: int64 [T·k], indices of the pairs in sorted order; pair p belongs to token p // k.
        ends: int32 [E], end of each expert's rows.
        bounds: `ends` on the host, preceded by 0; None if the host did not wait for it.
    """

    order: Tensor
    ends: Tensor
    bounds: list[int] | None

    def slices(self) -> Iterator[tuple[int, slice]]:
        """Yield the experts that have rows, with the slice of their rows."""
        bounds = self.bounds if self.bounds is not None else [0, *self.ends.tolist()]
        for expert, (begin, end) in enumerate(itertools.pairwise(bounds)):
            if begin < end:
                yield expert, slice(begin, end)


def group(experts: Tensor, count: int) -> Groups:
    """Sort the pairs of `experts` [T, k] by expert; ids of `count` or more belong to no local expert.

    Raises:
        EffpassError: on the CPU, if an id is negative. On a GPU the check would have to wait for the ids.
    """
    ids, order = experts.reshape(-1).sort(stable=True)
    if ids.is_cuda:
        first = torch.arange(1, count + 1, device=ids.device, dtype=ids.dtype)
        return Groups(order, torch.searchsorted(ids, first).to(torch.int32), None)
    if ids.numel() and int(ids[0]) < 0:
        raise EffpassError(
            f"effpass::moe_ffn got the expert id {int(ids[0])}",
            hint=f"ids are 0 ... {count - 1}; {count} and more for an expert that is not here",
        )
    ends = torch.bincount(ids.clamp(max=count), minlength=count + 1)[:count].cumsum(0)
    return Groups(order, ends.to(torch.int32), [0, *ends.tolist()])


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    """Multiply each row with the weight of its expert.

    Args:
        rows: [P, K], sorted by expert.
        weight: [E, N, K].
        bias: [E, N] or None.
        groups: grouping of the rows.

    Returns:
        [P, N]; rows of no local expert are undefined.
    """
    if groups.bounds is None and takes(rows, weight):
        product = torch._grouped_mm(rows, weight.transpose(1, 2), groups.ends)
        if bias is None:
            return product
        at = torch.arange(rows.shape[0], device=rows.device)
        expert = torch.searchsorted(groups.ends, at, right=True).clamp_(max=weight.shape[0] - 1)
        return product.add_(bias[expert])
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for e, part in groups.slices():
        if bias is None:
            torch.mm(rows[part], weight[e].t(), out=out[part])
        else:
            torch.addmm(bias[e], rows[part], weight[e].t(), out=out[part])
    return out


def outer(left: Tensor, right: Tensor, groups: Groups) -> Tensor:
    """For each expert, the sum of the outer products of its rows.

    Args:
        left: [P, M], sorted by expert.
        right: [P, K], sorted by expert.
        groups: grouping of the rows.

    Returns:
        [E, M, K]; zeros for an expert without rows.
    """
    if groups.bounds is None and takes(left, right):
        return torch._grouped_mm(left.t(), right, groups.ends)
    out = left.new_zeros(groups.ends.shape[0], left.shape[1], right.shape[1])
    for expert, part in groups.slices():
        torch.mm(left[part].t(), right[part], out=out[expert])
    return out


def takes(a: Tensor, b: Tensor) -> bool:
    """Whether `torch._grouped_mm` takes these tensors: aligned bfloat16 on compute capability 9.x or 10.x."""
    return (
        a.is_cuda
        and a.dtype == b.dtype == torch.bfloat16
        and a.shape[0] > 0
        and torch.cuda.get_device_capability(a.device)[0] in (9, 10)
        and all(_aligned(t) for t in (a, b))
    )


def _aligned(tensor: Tensor) -> bool:
    """Whether address and strides are multiples of 16 bytes, apart from a stride of 1 in the last two dimensions."""
    strides = tensor.stride()[-2:]
    return tensor.data_ptr() % 16 == 0 and 1 in strides and all(s == 1 or s % 8 == 0 for s in tensor.stride())
