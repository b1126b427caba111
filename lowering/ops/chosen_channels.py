"""A gated feed-forward network over chosen channels: those that a token tree shares.

    out_t = Σ_c a_tc (w_up,c · x_t) w_down,c      over the chosen channels c

a is the gate's output behind its activation, of all channels: what the choice is made by. Weights of channels that were
not chosen are not read. ("Accelerate Speculative Decoding with Sparse Computation in Verification",
https://arxiv.org/abs/2512.21911; the gate decides what is read of the other two, CATS, https://arxiv.org/abs/2404.08763.)

A channel is a row of W_up and a column of W_down [D, F]. So that it is one piece of memory in both, W_down lies column
by column: its strides are (1, D). Others are read by PyTorch's operators.

Shapes: T tokens, D width, F channels, M chosen channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import register_flop_formula

from effpass.core.errors import EffpassError
from effpass.lowering.ops.kernel_choice import triton_kernels

__all__ = ["TOLERANCE", "chosen_channels", "largest_channels"]

#: What an output of the kernel may differ from the reference, relative to the largest value of the output. Both round
#: what the first product gives and its product with the gate; they sum in another order.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-6}


def _largest_channels(energy: Tensor, count: int) -> Tensor:
    return energy.sort(descending=True, stable=True).indices[:count].sort().values.int()


@torch.library.custom_op("effpass::largest_channels", mutates_args=(), schema="(Tensor energy, int count) -> Tensor")
def largest_channels(energy: Tensor, count: int) -> Tensor:
    """The `count` channels with most `energy` float32 [F], int32 [count], ascending; of equal ones the first.

    Raises:
        EffpassError: there are not so many.
    """
    _check_count(energy, count)
    return _largest_channels(energy, count)


def _check_count(energy: Tensor, count: int) -> None:
    if energy.dim() != 1 or not 0 < count <= energy.shape[0]:
        raise EffpassError(
            f"effpass::largest_channels: {count} channels of {tuple(energy.shape)}", hint="give 1 or more of a vector"
        )


@largest_channels.register_fake
def _(energy, count):  # type: ignore[no-untyped-def]
    _check_count(energy, count)
    return energy.new_empty(count, dtype=torch.int32)


@largest_channels.register_kernel("cuda")
def _(energy, count):  # type: ignore[no-untyped-def]
    _check_count(energy, count)
    kernels = triton_kernels("chosen_channels")
    run = kernels.largest_channels if kernels and kernels.searches(energy) else _largest_channels
    return run(energy, count)


def _chosen_channels(x: Tensor, active: Tensor, up: Tensor, down: Tensor, channels: Tensor) -> Tensor:
    index = channels.long()
    return linear(active[:, index] * linear(x, up[index]), down[:, index])


@torch.library.custom_op(
    "effpass::chosen_channels",
    mutates_args=(),
    schema="(Tensor x, Tensor active, Tensor up, Tensor down, Tensor channels) -> Tensor",
)
def chosen_channels(x: Tensor, active: Tensor, up: Tensor, down: Tensor, channels: Tensor) -> Tensor:
    """The network's output; see the equation above.

    Args:
        x: [T, D].
        active: [T, F], a.
        up: [F, D].
        down: [D, F].
        channels: int32 [M], each once.

    Returns:
        [T, D].

    Raises:
        EffpassError: sizes don't match.
    """
    _check(x, active, up, down)
    return _chosen_channels(x, active, up, down, channels)


def _check(x: Tensor, active: Tensor, up: Tensor, down: Tensor) -> None:
    (tokens, width), channels = x.shape, up.shape[0]
    if active.shape != (tokens, channels) or up.shape[1] != width or down.shape != (width, channels):
        raise EffpassError(
            f"effpass::chosen_channels: x {tuple(x.shape)}, active {tuple(active.shape)}, up {tuple(up.shape)}, down"
            f" {tuple(down.shape)}",
            hint="they are [T, D], [T, F], [F, D] and [D, F]",
        )


@chosen_channels.register_fake
def _(x, active, up, down, channels):  # type: ignore[no-untyped-def]
    _check(x, active, up, down)
    return x.new_empty(x.shape)


@chosen_channels.register_kernel("cuda")
def _(x, active, up, down, channels):  # type: ignore[no-untyped-def]
    _check(x, active, up, down)
    kernels = triton_kernels("chosen_channels")
    run = kernels.chosen_channels if kernels and kernels.supported(x, active, up, down) else _chosen_channels
    return run(x, active, up, down, channels)


@register_flop_formula(torch.ops.effpass.chosen_channels)
def _(x: Any, active: Any, up: Any, down: Any, channels: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> Any:
    return 2 * 2 * x[0] * x[1] * channels[0]
