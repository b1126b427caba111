"""Allocation of host memory for KV caches that GPU kernels read and write directly (:mod:`effpass.runtime.kv_offload`).

The memory is *pinned*, so that the operating system can neither move nor swap it, and mapped, so that kernels access it
over the bus at its own address. PyTorch's pinned allocator rounds sizes up to powers of two and keeps freed memory, so
caches of many gigabytes are registered with CUDA individually instead. :class:`HostMemory` enforces a limit over all
caches of a model, and memory is released with the last tensor that uses it.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from effpass.core.available_memory import available_memory
from effpass.core.errors import HostMemoryError

__all__ = ["HostMemory", "Slab"]

_SHARE = 0.9  # largest share of the available memory to allocate; the rest is left to the system
_PORTABLE_AND_MAPPED = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped


class Slab:
    """A zero-initialized block of host memory, which is freed when neither of its two tensors is referenced any more.

    Attributes:
        tensor: the memory as a CPU tensor.
        seen: the same memory as a tensor of the device.
    """

    def __init__(self, tensor: Tensor, seen: Tensor) -> None:
        self.tensor = tensor
        self.seen = seen


class HostMemory:
    """Allocator and accounting of the host memory that the caches of one model use.

    Args:
        limit: maximum number of bytes of all caches together; None to be limited by the available memory only.

    Attributes:
        used: bytes that are currently allocated.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.used = 0

    def check(self, nbytes: int) -> None:
        """Raise a :class:`HostMemoryError` unless `nbytes` more bytes are allowed and available."""
        if self.limit is not None and self.used + nbytes > self.limit:
            gc.collect()  # a cache given to the user and its session form a reference cycle
        if self.limit is not None and self.used + nbytes > self.limit:
            raise HostMemoryError(
                f"keys and values take {nbytes / 1e9:.2f} GB of host memory beside {self.used / 1e9:.2f} GB of other"
                f" caches, and the limit is {self.limit / 1e9:.2f} GB",
                hint="raise host_memory, or lower the batch or the length",
            )
        available = available_memory()
        if available is not None and nbytes > _SHARE * available:
            raise HostMemoryError(
                f"keys and values take {nbytes / 1e9:.2f} GB of host memory, and {available / 1e9:.2f} GB are"
                " available",
                hint="lower the batch or the length, or give each layer a budget (prefix_kv)",
            )

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Slab:
        """Allocate memory for a tensor of `shape` that `device` can access.

        Raises:
            HostMemoryError: if the memory is not allowed or not available; nothing is allocated then.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        self.check(nbytes)
        if device.type != "cuda":
            tensor = torch.zeros(shape, dtype=dtype, device=device)
            owner, seen = tensor, tensor
        else:
            flat = torch.zeros(nbytes, dtype=torch.uint8)
            owner = _Pinned(flat, device)  # type: ignore[assignment]
            # Bytes viewed as `dtype`, because the array interface has no bfloat16.
            seen = torch.as_tensor(owner, device=device).view(dtype).view(shape)
            tensor = flat.view(dtype).view(shape)
        self.used += nbytes
        weakref.finalize(owner, self._give_back, nbytes).atexit = False
        return Slab(tensor, seen)

    def _give_back(self, nbytes: int) -> None:
        self.used -= nbytes


class _Pinned:
    """Memory of a CPU tensor that is registered with CUDA as long as this object, or a tensor made from it, exists."""

    def __init__(self, flat: Tensor, device: torch.device) -> None:
        code = _register(flat, device)
        if code:
            raise HostMemoryError(
                f"CUDA can't pin {flat.nbytes / 1e9:.2f} GB of host memory (error {code})",
                hint="lower the batch or the length; in a container, look at its memory limit and at `ulimit -l`",
            )
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (flat.nbytes,), "typestr": "|u1", "data": (flat.data_ptr(), False), "version": 3,
        }  # fmt: skip
        weakref.finalize(self, _unregister, flat, device).atexit = False


def _register(flat: Tensor, device: torch.device) -> int:
    """Pin the memory of a CPU tensor and return CUDA's error code, 0 for success."""
    with torch.cuda.device(device):
        code = int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, _PORTABLE_AND_MAPPED))
        if code:  # the next kernel launch reports the error again; clear it here
            with suppress(RuntimeError):
                torch.zeros(1, device=device)
    return code


def _unregister(flat: Tensor, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # a kernel may be reading it
        torch.cuda.cudart().cudaHostUnregister(flat.data_ptr())
