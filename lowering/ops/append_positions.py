"""Append the positions of new tokens to the slot table of a KV cache, in one kernel launch.

    start ← filled;  positions[b, start + t] ← new[b, t];  filled ← start + T

The table gives the position of the token in each slot, from which attention derives its mask
(:mod:`effpass.lowering.ops.cached_attention`). The decode engine's cache calls the operator once per model call.

Shapes: B batch size of the cache, S slots, T new tokens of each sequence.
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
    """Append T positions to each sequence, after the slots in use. The host does not wait for the device.

    Args:
        positions: int32 [B, S], position of the token in each slot, -1 in empty slots; written.
        start: int32 [1], slot of the first new token; written.
        filled: int32 [1], number of slots in use; written.
        new: int32 [rows, T] with rows ≤ B, positions of the new tokens, -1 for padding. Sequences from `rows` on stay
            unchanged. The caller must ensure filled + T ≤ S.
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
