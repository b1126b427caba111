"""Enter the positions of a call's tokens into the table of a cache's slots, in one launch.

start ← filled;  positions[b, start + t] ← new[b, t];  filled ← start + T
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.lowering.ops.kernel_choice import triton_kernels

__all__ = ["append_positions"]


def _append_positions(positions: Tensor, start: Tensor, filled: Tensor, new: Tensor) -> None:
    rows, tokens = new.shape
    start.copy_(filled)
    slots = start + torch.arange(tokens, dtype=torch.int32, device=new.device)
    positions[:rows].index_copy_(1, slots.long(), new)
    filled.add_(tokens)


@torch.library.custom_op(
    "effpass::append_positions",
    mutates_args=("positions", "start", "filled"),
    schema="(Tensor(a!) positions, Tensor(b!) start, Tensor(c!) filled, Tensor new) -> ()",
)
def append_positions(positions: Tensor, start: Tensor, filled: Tensor, new: Tensor) -> None:
    """Enter T tokens behind the slots in use; nothing waits for the device.

    Args:
        positions: int32 [B, S], written; -1 in empty slots.
        start: int32 [1], written: the slot of the first of the new tokens.
        filled: int32 [1], written: slots in use.
        new: int32 [rows, T] with rows ≤ B; -1 for padding. The rows behind stay as they are. The caller answers for
            filled + T ≤ S.
    """
    _append_positions(positions, start, filled, new)


@append_positions.register_fake
def _(positions, start, filled, new):  # type: ignore[no-untyped-def]
    return None


@append_positions.register_kernel("cuda")
def _(positions, start, filled, new):  # type: ignore[no-untyped-def]
    kernels = triton_kernels("append_positions")
    if kernels and kernels.supported(positions, new):
        kernels.append_positions(positions, start, filled, new)
    else:
        _append_positions(positions, start, filled, new)


@register_flop_formula(torch.ops.effpass.append_positions)
def _(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 0
