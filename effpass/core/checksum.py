"""Checksums of tensors: one to detect changes of a weight at run time, and one to identify a set of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["checksum", "digest"]

_CHUNK = 1 << 20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """``Σᵢ bitsᵢ · kᵢ mod 2⁶⁴`` with odd multipliers kᵢ that depend on the position, computed on the tensor's device.

    Odd multipliers are invertible, so a change of one element always changes the sum. Several changes, or an exchange
    of elements, leave it unchanged only by chance. NaNs are compared by their bits.
    """
    bits = tensor.detach().contiguous().flatten().view(_INTEGERS[tensor.element_size()])
    multipliers = _multipliers(min(_CHUNK, bits.numel()), bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in bits.split(_CHUNK):
        total = total * 0x2545F4914F6CDD1D + (chunk.long() * multipliers[: chunk.numel()]).sum()
    return int(total)


def _multipliers(count: int, device: torch.device) -> Tensor:
    position = torch.arange(count, dtype=torch.int64, device=device)
    mixed = (position + 1) * -0x61C8864680B583EB  # 2⁶⁴ / golden ratio, as a signed integer
    return (mixed ^ (mixed >> 29)) | 1


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, shapes, dtypes and contents of `tensors`."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
