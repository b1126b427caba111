"""Tracing of a module that has the inputs and outputs of a decode graph, for all sizes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from effpass.lowering.targets.cache_layers import CacheLayer
from effpass.lowering.targets.device import CPU

__all__ = ["plain_attention", "relate_sizes", "sizes_stay_free", "trace"]


def trace(
    module: torch.nn.Module,
    names: Sequence[str],
    layers: Sequence[CacheLayer],
    dtype: torch.dtype,
    device: torch.device,
) -> ExportedProgram:
    """Capture a module that has the inputs and outputs of a decode graph, for all sizes B, T and P.

    Args:
        module: module on `device`.
        names: names of the module's arguments, in order.
        layers: cache shapes, one entry per layer.
        dtype: dtype of the cache.
        device: device of the arguments.
    """
    # Sizes of 0 and 1 would become constants of the graph. It is captured at other sizes, and executed at 0 and 1 when
    # it is validated. Inductor tiles its loops for these sizes: few tokens, and 1024 positions in the cache after them.
    batch, tokens, past = 2, 3, 1021
    args = [
        torch.zeros(batch, tokens, dtype=torch.long),
        torch.ones(batch, past + tokens, dtype=torch.long),
        torch.arange(past, past + tokens).expand(batch, tokens).contiguous(),
        *(tensor for layer in layers for tensor in layer.zeros(batch, past, dtype, CPU)),
    ]
    at_least_0, at_least_1 = torch.export.Dim.DYNAMIC(min=0), torch.export.Dim.DYNAMIC(min=1)
    two = {0: at_least_1, 1: at_least_1}
    by_layer = (
        {0: at_least_1, 2: at_least_0} if layer.grows else {0: at_least_1} for layer in layers for _ in range(2)
    )
    shapes = (two, two, two, *by_layer)
    with torch.no_grad(), sizes_stay_free(), plain_attention(device):
        return torch.export.export(
            module,
            tuple(t.to(device) for t in args),
            dynamic_shapes=dict(zip(names, shapes, strict=True)),
            strict=False,
        )


def sizes_stay_free() -> Any:
    """Return a context manager in which tracing and compiling do not specialize on sizes of 0 and 1."""
    import torch.fx.experimental._config as symbolic_shapes_config

    return symbolic_shapes_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]


def plain_attention(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context manager for tracing, compiling and running a decode graph, with attention not fused on a GPU.

    Attention is then two matrix products and a softmax. PyTorch chooses among its fused GPU kernels by size when a
    graph is traced, and each supports some sizes only: one pads the mask to multiples of 16, another refuses a single
    key, and none that takes a mask shares keys among query heads. A decode graph must work for all sizes.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


def relate_sizes(
    layers: Sequence[CacheLayer], input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
) -> None:
    """Assert, while tracing, which sizes of the inputs are equal."""
    batch, tokens = input_ids.shape
    for tensor in (attention_mask, position_ids, *past):
        torch._check(tensor.shape[0] == batch)
    lengths = [past[2 * i + part].shape[2] for i, layer in enumerate(layers) if layer.grows for part in (0, 1)]
    for length in lengths:
        torch._check(length == lengths[0])
        torch._check(attention_mask.shape[1] == length + tokens)
