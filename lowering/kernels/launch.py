"""What the kernels share: programmatic dependent launch, counters of programs that finished, and the size of a GPU.

*Programmatic dependent launch* (compute capability 9.0 on) starts a kernel before the one in front of it has ended, so
that it loads while that one computes, and waits (`gdc_wait`) before it touches anything that was just written. What is
loaded before the wait:

* linears: weights, biases and norms, so that no launch right in front may write them. They let the next kernel start
  (`gdc_launch_dependents`) at once.
* attention: norms, positions, and slots that the cache held before the call. It lets the next kernel start only after
  its own wait, and a step begins with launches that know nothing of all this (an embedding, say) and wait for all that
  went before. So whatever an earlier step wrote has been written.

*Counters* tell a program that it is the last of several to finish, so that it can combine what they left. They are zero
between launches: the last program writes the zero back.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["counters", "descriptor", "interpreted", "launch_options", "multiprocessors", "overlaps"]

_INTERPRETED = bool(triton.knobs.runtime.interpret)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return _INTERPRETED


# Launches take counters in turn, so that launches of different streams and graphs do not share them.
_COUNTERS = 1 << 20
_taken: dict[torch.device, int] = {}


@functools.cache
def _all_counters(device: torch.device) -> Tensor:
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


def counters(device: torch.device, count: int) -> Tensor:
    """`count` int32 zeros that belong to one launch."""
    first = _taken.get(device, 0)
    if first + count > _COUNTERS:
        first = 0
    _taken[device] = first + triton.cdiv(count, 4) * 4  # all at 16 bytes, or Triton compiles a kernel twice
    return _all_counters(device)[first : first + count]


def descriptor(cached: Tensor, rows: int, width: int) -> TensorDescriptor | None:
    """Of all rows of keys, values or latents [B, G, S, K], of `rows` and `width` columns at a time.

    None where the device has no tensor memory accelerator, or the strides don't fit.
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
    """Whether kernels on `device` may start before those in front of them have ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device, num_warps: int, num_stages: int = 1) -> dict[str, Any]:
    """Keyword arguments of a launch; none for Triton's interpreter."""
    if _INTERPRETED:
        return {}
    _all_counters(device)  # from the first launch on, which is no graph's: a graph would own their memory
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
    return {**options, "launch_pdl": True} if overlaps(device) else options


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of one kind run at once, at the least."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
