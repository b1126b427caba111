"""The step on a GPU with Triton: a few launches and the products for all equal matrices of a group.

It computes what `update` and `batches` compute. A parameter takes this road when its gradient, buffers and matrices lie
in memory as they are read: contiguous, aligned, in float32 or half precision.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from effpass.trainers.mona.batches import scale_of
from effpass.trainers.mona.layout import Part
from effpass.trainers.mona.newton_schulz import NewtonSchulz

__all__ = ["Member", "Plan", "supported"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Member:
    """A parameter and its buffers; `average` is None where α = 0."""

    parameter: Tensor
    momentum: Tensor
    average: Tensor | None
    parts: tuple[Part, ...]

    def rows(self) -> tuple[Tensor | None, ...]:
        """Gradient, momentum, average, parameter: the rows of the kernels' table."""
        return self.parameter.grad, self.momentum, self.average, self.parameter


def supported(member: Member, newton_schulz: NewtonSchulz) -> bool:
    """Whether the kernels take this parameter, as its gradient is now."""
    if not member.parameter.is_cuda or newton_schulz.form == "torch" or not _has_triton():
        return False
    tensors = [tensor for tensor in member.rows() if tensor is not None]
    return (
        newton_schulz.work_dtype(member.momentum) in _DTYPES
        and member.parameter.numel() > 0
        and all(t.dtype in _DTYPES and t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)
        and all(part.dim == 0 and part.matrices[1] * part.matrices[2] % 8 == 0 for part in member.parts)
    )


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@dataclass
class Bucket:
    """Equal matrices of equal dtypes on one device: each one's member by number, and its offset in that one."""

    m: int
    n: int
    dtypes: tuple[torch.dtype | None, ...]
    device: torch.device
    index: Tensor
    elements: Tensor
    # Of the last step: addresses on the host (pinned, read again by each replay of a captured copy) and on the device.
    host: Tensor | None = None
    table: Tensor | None = None

    def addresses(self, pointers: Tensor) -> Tensor:
        """[4, N] on the device, uploaded when an address has changed; `pointers` [4, members]."""
        sizes = torch.tensor([0 if dtype is None else dtype.itemsize for dtype in self.dtypes])
        found = pointers[:, self.index] + sizes[:, None] * self.elements
        if self.table is None or self.host is None or not torch.equal(found, self.host):
            self.host = found.pin_memory()
            self.table = self.host.to(self.device, non_blocking=True)
        return self.table


class Plan:
    """Which matrices of `members` go together. It stays valid while dtypes, sizes and alignment do."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        places: dict[Any, tuple[list[int], list[int]]] = {}
        for number, member in enumerate(self.members):
            dtypes = tuple(None if tensor is None else tensor.dtype for tensor in member.rows())
            row = member.parameter[0].numel()
            for part in member.parts:
                count, m, n = part.matrices
                key = (m, n, dtypes, member.parameter.device)
                index, elements = places.setdefault(key, ([], []))
                index += [number] * count
                elements += [part.start * row + i * m * n for i in range(count)]
        self.buckets = [Bucket(*key, *map(torch.tensor, place)) for key, place in places.items()]

    def upload(self) -> None:
        """Bring the tables to the devices; before every step, since gradients move."""
        rows = zip(*(member.rows() for member in self.members), strict=True)
        pointers = torch.tensor([[0 if t is None else t.data_ptr() for t in row] for row in rows])
        for bucket in self.buckets:
            bucket.addresses(pointers)

    def check_finite(self, flags: dict[torch.device, Tensor]) -> None:
        """Set the flag of a device to false where a gradient there is not finite."""
        from effpass.lowering.kernels import mona

        for bucket in self.buckets:
            assert bucket.table is not None
            assert bucket.dtypes[0] is not None
            flag = flags.setdefault(bucket.device, torch.ones((), dtype=torch.bool, device=bucket.device))
            mona.finite(bucket.table, bucket.dtypes[0], bucket.m * bucket.n, flag)

    def step(self, group: dict[str, Any], newton_schulz: NewtonSchulz, finite: Tensor | None) -> None:
        """One step with the hyper-parameters of `group`; nothing is written where `finite` is false."""
        from effpass.lowering.kernels import mona

        for bucket in self.buckets:
            table, (grad, momentum, average, parameter) = bucket.table, bucket.dtypes
            assert table is not None
            assert grad is not None
            assert momentum is not None
            assert parameter is not None
            work = newton_schulz.dtype or torch.float16
            # bfloat16 until the norm is known: it has the range, and one rounding of the input drowns in its noise.
            held = torch.bfloat16 if work == torch.float16 else work
            x = torch.empty((table.shape[1], bucket.m, bucket.n), dtype=held, device=bucket.device)
            squared_norm = mona.advance(
                table, x, grad, momentum, average,
                momentum=group["momentum"], beta=group["beta_a"], gain=group["alpha"] * (1 - group["beta_a"]),
                nesterov=group["nesterov"], finite=finite,
            )  # fmt: skip
            lr = group["lr"]
            if isinstance(lr, Tensor):
                lr = lr.to(bucket.device, torch.float32)
            else:
                lr = torch.full((), lr, dtype=torch.float32, device=bucket.device)
            for start, update in newton_schulz.parts(x, squared_norm):
                mona.apply(
                    table[:, start : start + len(update)].contiguous(), update, parameter, lr,
                    scale=scale_of(group["scale"], bucket.m, bucket.n), weight_decay=group["weight_decay"],
                    cautious=group["cautious"], finite=finite,
                )  # fmt: skip
