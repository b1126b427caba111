"""A gated feed-forward network restricted to a subset of its channels, which the nodes of a token tree share.

    out_t = Σ_c a_tc (w_up,c · x_t) w_down,c      over the chosen channels c

a is the activated output of the gate for all channels, from which the channels are chosen. Weights of other channels
are not read. Sharing channels within a tree follows "Accelerate Speculative Decoding with Sparse Computation in
Verification" (https://arxiv.org/abs/2512.21911); letting the gate decide what is read of the other two weights follows
CATS (https://arxiv.org/abs/2404.08763). :mod:`effpass.runtime.speculative.shared_channels` chooses the channels and
calls the operator.

A channel is a row of W_up [F, D] and a column of W_down [D, F]. For a channel to be contiguous in both, the kernel
takes W_down stored by column, with strides (1, D); otherwise PyTorch's operators run.

Shapes: T tokens, D hidden size, F channels, M chosen channels.
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

#: Maximum deviation of the kernel's output from the reference, relative to the largest value of the output. Both round
#: the first product and its product with the gate; they differ in the order of summation.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-6}


def _largest_channels(energy: Tensor, count: int) -> Tensor:
    return energy.sort(descending=True, stable=True).indices[:count].sort().values.int()


@torch.library.custom_op("effpass::largest_channels", mutates_args=(), schema="(Tensor energy, int count) -> Tensor")
def largest_channels(energy: Tensor, count: int) -> Tensor:
    """Return the `count` channels with the largest `energy`; among equals, the lowest indices.

    Args:
        energy: float32 [F].
        count: number of channels M, from 1 to F.

    Returns:
        int32 [M], ascending.

    Raises:
        EffpassError: if `energy` is not a vector or `count` is out of range.
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
    """Compute the network's output from the chosen channels alone.

    Args:
        x: [T, D].
        active: [T, F], activated gate a.
        up: [F, D], W_up.
        down: [D, F], W_down.
        channels: int32 [M], chosen channels, without repetition.

    Returns:
        [T, D].

    Raises:
        EffpassError: if sizes don't match.
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
