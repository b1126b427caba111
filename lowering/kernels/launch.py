"""Launch utilities that the kernels share: programmatic dependent launch, completion counters and device properties.

*Programmatic dependent launch* (compute capability 9.0 and above) starts a kernel before the preceding one has ended,
so that it can load data while the other computes. The kernel calls `gdc_wait` before it accesses anything that a
preceding kernel may just have written, and `gdc_launch_dependents` to let the next kernel start. Before the wait,
kernels load:

* In linear layers: weights, biases and norm weights, which the kernel launched immediately before must therefore not
  write. Linear kernels let the next kernel start at once.
* In attention: norm weights, positions, and the slots that the cache held before the call. Attention kernels let the
  next kernel start only after their own wait. A decode step begins with kernels launched without this feature (an
  embedding, for example), which wait for all earlier kernels, so that everything written by an earlier step is visible.

*Counters* tell a program that it is the last of several to finish and thus has to combine their partial results. They
are zero between launches: the last program resets them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["counters", "descriptor", "interpreted", "launch_options", "multiprocessors", "overlaps", "shared_memory"]

_INTERPRETED = bool(triton.knobs.runtime.interpret)


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, on the CPU."""
    return _INTERPRETED


# Launches take successive parts of one buffer, so that launches of different streams and graphs do not share counters.
_COUNTERS = 1 << 20
_taken: dict[torch.device, int] = {}


@functools.cache
def _all_counters(device: torch.device) -> Tensor:
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


def counters(device: torch.device, count: int) -> Tensor:
    """Return `count` int32 zeros for the use of one launch, which must leave them zero."""
    first = _taken.get(device, 0)
    if first + count > _COUNTERS:
        first = 0
    _taken[device] = first + triton.cdiv(count, 4) * 4  # 16-byte aligned: Triton specializes on alignment
    return _all_counters(device)[first : first + count]


def descriptor(cached: Tensor, rows: int, width: int) -> TensorDescriptor | None:
    """Return a tensor descriptor for tiles of keys, values or latents, read by the tensor memory accelerator (TMA).

    Batch, heads and slots are flattened into one dimension of rows, so that one descriptor serves all heads.

    Args:
        cached: [B, G, S, K], any strides with the last dimension contiguous.
        rows: number of slots in a tile.
        width: number of columns in a tile.

    Returns:
        The descriptor; None if the device has no TMA, or address, strides or size don't fit.
    """
    (batch, groups, slots, size), (of_batch, of_group, of_row, _) = cached.shape, cached.stride()
    if not (overlaps(cached.device) or interpreted()) or of_row * cached.element_size() % 16 or cached.data_ptr() % 16:
        return None
    if of_batch % of_row or of_group % of_row:
        return None
    count = ((batch - 1) * of_batch + (groups - 1) * of_group) // of_row + slots
    return TensorDescriptor(cached, [count, size], [of_row, 1], [rows, width]) if count < 1 << 31 else None


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Return whether `device` supports programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device, num_warps: int, num_stages: int = 1) -> dict[str, Any]:
    """Return the keyword arguments of a launch, with dependent launch if supported; none for Triton's interpreter."""
    if _INTERPRETED:
        return {}
    _all_counters(device)  # allocated at the first launch, outside of graph capture: a graph would own the memory
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
    return {**options, "launch_pdl": True} if overlaps(device) else options


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors, which is the least number of programs that run at once; 4 on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the maximum bytes of shared memory of a program; those of compute capability 9.0 on a CPU."""
    if device.type != "cuda":
        return 227 << 10
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))
