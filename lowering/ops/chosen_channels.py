"""A gated feed-forward network over chosen channels: those that a token tree shares.

    out_t = Σ_c a_tc (w_up,c · x_t) w_down,c      over the channels c of the chosen tiles

a is the gate's output behind its activation, of all channels: what the choice is made by. Weights of channels that were
not chosen are not read. ("Accelerate Speculative Decoding with Sparse Computation in Verification",
https://arxiv.org/abs/2512.21911; the gate decides what is read of the other two, CATS, https://arxiv.org/abs/2404.08763.)

Shapes: T tokens, D width, F channels, M chosen tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import register_flop_formula

from effpass.core.errors import EffpassError
from effpass.lowering.ops.kernel_choice import triton_kernels

__all__ = ["TOLERANCE", "chosen_channels"]

#: What an output of the kernel may differ from the reference, relative to the largest value of the output. Both round
#: what the first product gives and its product with the gate; they sum in another order.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-6}


def _chosen_channels(x: Tensor, active: Tensor, up: Tensor, down: Tensor, tiles: Tensor, tile: int) -> Tensor:
    channels = (tiles.long()[:, None] * tile + torch.arange(tile, device=x.device)).flatten()
    return linear(active[:, channels] * linear(x, up[channels]), down[:, channels])


@torch.library.custom_op(
    "effpass::chosen_channels",
    mutates_args=(),
    schema="(Tensor x, Tensor active, Tensor up, Tensor down, Tensor tiles, int tile) -> Tensor",
)
def chosen_channels(x: Tensor, active: Tensor, up: Tensor, down: Tensor, tiles: Tensor, tile: int) -> Tensor:
    """The network's output; see the equation above.

    Args:
        x: [T, D].
        active: [T, F], a.
        up: [F, D].
        down: [D, F].
        tiles: int32 [M], numbers of tiles, each once.
        tile: channels of a tile; divides F.

    Returns:
        [T, D].

    Raises:
        EffpassError: sizes don't match.
    """
    _check(x, active, up, down, tile)
    return _chosen_channels(x, active, up, down, tiles, tile)


def _check(x: Tensor, active: Tensor, up: Tensor, down: Tensor, tile: int) -> None:
    (tokens, width), channels = x.shape, up.shape[0]
    if active.shape != (tokens, channels) or up.shape[1] != width or down.shape != (width, channels) or channels % tile:
        raise EffpassError(
            f"effpass::chosen_channels: x {tuple(x.shape)}, active {tuple(active.shape)}, up {tuple(up.shape)}, down"
            f" {tuple(down.shape)}, tiles of {tile}",
            hint="they are [T, D], [T, F], [F, D] and [D, F], and a tile divides F",
        )


@chosen_channels.register_fake
def _(x, active, up, down, tiles, tile):  # type: ignore[no-untyped-def]
    _check(x, active, up, down, tile)
    return x.new_empty(x.shape)


@chosen_channels.register_kernel("cuda")
def _(x, active, up, down, tiles, tile):  # type: ignore[no-untyped-def]
    _check(x, active, up, down, tile)
    kernels = triton_kernels("chosen_channels")
    run = kernels.chosen_channels if kernels and kernels.supported(x, active, up, down, tile) else _chosen_channels
    return run(x, active, up, down, tiles, tile)


@register_flop_formula(torch.ops.effpass.chosen_channels)
def _(x: Any, active: Any, up: Any, down: Any, tiles: Any, tile: Any, *args: Any, out_val: Any = None, **kwargs: Any):  # type: ignore[no-untyped-def]
    tokens, width = x
    return 2 * 2 * tokens * width * tiles[0] * tile
