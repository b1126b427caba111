"""Host memory for caches, which a GPU reads and writes by itself: never more than allowed, and given back.

Memory is *pinned*, so that the system can neither move it nor swap it out, and mapped, so that kernels read it through
the bus at its own address. PyTorch's own pinned allocator rounds sizes up to powers of two and keeps what was freed;
caches of many gigabytes are registered with CUDA one by one instead.
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

_SHARE = 0.9  # of what is available; the rest is the system's
_PORTABLE_AND_MAPPED = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped


class Slab:
    """Zeros in host memory, freed when the last of its two tensors is gone.

    Attributes:
        tensor: on the CPU.
        seen: the same memory as a tensor of the device.
    """

    def __init__(self, tensor: Tensor, seen: Tensor) -> None:
        self.tensor = tensor
        self.seen = seen


class HostMemory:
    """What the caches of one model take of the host's memory.

    Args:
        limit: bytes at most, of all caches; None for most of what is available.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.used = 0

    def check(self, nbytes: int) -> None:
        """Raise a :class:`HostMemoryError` unless `nbytes` more are allowed."""
        if self.limit is not None and self.used + nbytes > self.limit:
            gc.collect()  # a cache that was handed to the user and its session know each other
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
        """Memory for a tensor of `shape` that `device` sees.

        Raises:
            HostMemoryError: it is not allowed, or the system does not give it; nothing is kept of it.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        self.check(nbytes)
        if device.type != "cuda":
            tensor = torch.zeros(shape, dtype=dtype, device=device)
            owner, seen = tensor, tensor
        else:
            flat = torch.zeros(nbytes, dtype=torch.uint8)
            owner = _Pinned(flat, device)  # type: ignore[assignment]
            # A view of any type: an array interface has no bfloat16.
            seen = torch.as_tensor(owner, device=device).view(dtype).view(shape)
            tensor = flat.view(dtype).view(shape)
        self.used += nbytes
        weakref.finalize(owner, self._give_back, nbytes).atexit = False
        return Slab(tensor, seen)

    def _give_back(self, nbytes: int) -> None:
        self.used -= nbytes


class _Pinned:
    """Memory of a CPU tensor, registered with CUDA for as long as a tensor sees it."""

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
    """Pin memory; 0, or CUDA's error."""
    with torch.cuda.device(device):
        code = int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, _PORTABLE_AND_MAPPED))
        if code:  # CUDA tells the next kernel of it too
            with suppress(RuntimeError):
                torch.zeros(1, device=device)
    return code


def _unregister(flat: Tensor, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # a kernel may be reading it
        torch.cuda.cudart().cudaHostUnregister(flat.data_ptr())
