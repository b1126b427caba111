"""The step of MONA on a GPU with Triton: a few kernel launches and matrix products for all equal matrices of a group.

It computes the same as :mod:`.update` and :mod:`.batches`. It supports parameters whose gradient, buffers and matrices
are contiguous and aligned in memory, in float32 or half precision.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
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
    """Parameter with its buffers; `average` is None if α = 0."""

    parameter: Tensor
    momentum: Tensor
    average: Tensor | None
    parts: tuple[Part, ...]

    def rows(self) -> tuple[Tensor | None, ...]:
        """Return gradient, momentum, average and parameter, in the order of the rows of the kernels' table."""
        return self.parameter.grad, self.momentum, self.average, self.parameter


def supported(member: Member, newton_schulz: NewtonSchulz) -> bool:
    """Return whether the kernels support this parameter with its current gradient."""
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
    """Equal matrices with equal dtypes on one device.

    Attributes:
        m, n: size of a matrix.
        dtypes: dtypes of gradient, momentum, average and parameter; None for an average that is not kept.
        device: device of the matrices.
        numbers: for each matrix, the index of its member.
        elements: for each matrix, the offset of its first element in its member.
        table: addresses of the matrices in the last step, int64 [4, N] on the device; None before the first upload.
    """

    m: int
    n: int
    dtypes: tuple[torch.dtype | None, ...]
    device: torch.device
    numbers: list[int] = field(default_factory=list)
    elements: list[int] = field(default_factory=list)
    table: Tensor | None = None


class Upload:
    """Upload of the tables of all buckets on one device, in a single copy.

    Args:
        buckets: buckets on one device.
        members: number of members of the plan.
    """

    def __init__(self, buckets: Sequence[Bucket], members: int) -> None:
        self.device = buckets[0].device
        self.buckets = buckets
        places, offsets = [], []
        for bucket in buckets:
            numbers, elements = torch.tensor(bucket.numbers), torch.tensor(bucket.elements)
            for row, dtype in enumerate(bucket.dtypes):
                places.append(row * members + numbers)
                offsets.append(elements * (0 if dtype is None else dtype.itemsize))
        self.places, self.offsets = torch.cat(places), torch.cat(offsets)
        self.host: Tensor | None = None  # pinned; kept because each replay of a captured copy reads it again

    def __call__(self, addresses: Tensor) -> None:
        """Upload the tables.

        Args:
            addresses: addresses of the tensors, int64 [4 · members], one row of the table after the other.
        """
        self.host = (addresses[self.places] + self.offsets).pin_memory()
        tables = self.host.to(self.device, non_blocking=True)
        for bucket, table in zip(self.buckets, tables.split([4 * len(b.numbers) for b in self.buckets]), strict=True):
            bucket.table = table.view(4, -1)


def _on(lr: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(lr, Tensor):
        return lr.to(device, torch.float32)
    return torch.full((), lr, dtype=torch.float32, device=device)


class Plan:
    """Buckets of the matrices of `members`; a plan is valid as long as dtypes, sizes and alignment do not change."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        found: dict[Any, Bucket] = {}
        for number, member in enumerate(self.members):
            dtypes = tuple(None if tensor is None else tensor.dtype for tensor in member.rows())
            row = member.parameter[0].numel()
            for part in member.parts:
                count, m, n = part.matrices
                key = (m, n, dtypes, member.parameter.device)
                bucket = found.setdefault(key, Bucket(*key))
                bucket.numbers += [number] * count
                bucket.elements += [part.start * row + i * m * n for i in range(count)]
        self.buckets = list(found.values())
        self._uploads = [
            Upload([bucket for bucket in self.buckets if bucket.device == device], len(self.members))
            for device in dict.fromkeys(bucket.device for bucket in self.buckets)
        ]
        # All tensors but the gradients. The parameter fills the row of an average that is not kept; it is not read.
        rows = [(m.momentum, m.parameter if m.average is None else m.average, m.parameter) for m in self.members]
        self._kept = [tensor for row in zip(*rows, strict=True) for tensor in row]
        self._pointers: list[int] = []

    def upload(self) -> None:
        """Copy the tables to the devices if an address has changed; called in every step, since gradients may move."""
        pointers = [member.parameter.grad.data_ptr() for member in self.members]  # type: ignore[union-attr]
        pointers += map(Tensor.data_ptr, self._kept)
        if pointers != self._pointers:
            self._pointers = pointers
            addresses = torch.tensor(pointers)
            for upload in self._uploads:
                upload(addresses)

    def check_finite(self, flags: dict[torch.device, Tensor]) -> None:
        """Set the flag of a device to false if a gradient on it is not finite."""
        from effpass.lowering.kernels import mona

        for bucket in self.buckets:
            assert bucket.table is not None
            assert bucket.dtypes[0] is not None
            if bucket.device not in flags:
                flags[bucket.device] = torch.ones((), dtype=torch.bool, device=bucket.device)
            mona.finite(bucket.table, bucket.dtypes[0], bucket.m * bucket.n, flags[bucket.device])

    def step(self, group: dict[str, Any], newton_schulz: NewtonSchulz, finite: Tensor) -> None:
        """Take one step with the hyper-parameters of `group`; nothing is written if `finite` is false."""
        from effpass.lowering.kernels import mona

        rates = {upload.device: _on(group["lr"], upload.device) for upload in self._uploads}
        flags = {upload.device: finite.to(upload.device) for upload in self._uploads}
        for bucket in self.buckets:
            table, (grad, momentum, average, parameter) = bucket.table, bucket.dtypes
            assert table is not None
            assert grad is not None
            assert momentum is not None
            assert parameter is not None
            work = newton_schulz.dtype or torch.float16
            # bfloat16 before normalization: it has the range, and one rounding is small compared to the input's noise.
            held = torch.bfloat16 if work == torch.float16 else work
            x = torch.empty((table.shape[1], bucket.m, bucket.n), dtype=held, device=bucket.device)
            squared_norm = mona.advance(
                table, x, grad, momentum, average,
                momentum=group["momentum"], beta=group["beta_a"], gain=group["alpha"] * (1 - group["beta_a"]),
                nesterov=group["nesterov"], finite=flags[bucket.device],
            )  # fmt: skip
            for start, update in newton_schulz.parts(x, squared_norm):
                mona.apply(
                    table[:, start : start + len(update)].contiguous(), update, parameter, rates[bucket.device],
                    scale=scale_of(group["scale"], bucket.m, bucket.n), weight_decay=group["weight_decay"],
                    cautious=group["cautious"], finite=flags[bucket.device],
                )  # fmt: skip
