"""Loss of the first stage of a conversion: each new layer imitates the attention that it replaces.

    L = mean over layers of ‖new(x) − old(x)‖² / ‖old(x)‖²

x is the input of the old layer in the whole model. All layers are trained at the same time but independently of each
other, and no gradient passes through the model.

Output projections are the only part of a layer in which this loss is quadratic: with z(x) what a layer projects,

    W = argmin Σ ‖W z(x) − old(x)‖² + λ ‖W‖²,    W (Z + λ) = Y,    Z = Σ z zᵀ,  Y = Σ old(x) zᵀ

They are set to this optimum before the other weights are trained, and again afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effpass.runtime.linear_attention.attention_layers import attention_layers

__all__ = ["alignment", "fit_outputs", "recorded"]

_RIDGE = 1e-3  # λ, of the mean of the diagonal of Z


@contextmanager
def recorded(model: Any, layers: list[int]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Record inputs and outputs [B, T, D] of the attention of these layers whenever `model` is called inside."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def hook(index: int) -> Any:
        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            found[index] = given, output[0] if isinstance(output, tuple) else output

        return keep

    handles = [
        getattr(parent, name).register_forward_hook(hook(index), with_kwargs=True)
        for index, (parent, name) in attention_layers(model, layers).items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def alignment(layers: Mapping[int, nn.Module], teacher: Any, ids: Tensor) -> Tensor:
    """Compute the loss of a micro-batch.

    Args:
        layers: new layers by layer index.
        teacher: whole model.
        ids: token ids, int64 [B, T].
    """
    with torch.no_grad(), recorded(teacher, list(layers)) as found:
        teacher(input_ids=ids, use_cache=False, logits_to_keep=1)
    # With checkpointing, only the activations of one layer are in memory at a time.
    losses = [checkpoint(_distance, layers[i], *found[i], use_reentrant=False) for i in layers]
    return torch.stack(losses).mean()


def _distance(layer: nn.Module, given: Tensor, wanted: Tensor) -> Tensor:
    made = layer(given.to(next(layer.parameters()).dtype))[0]
    return (made.float() - wanted.float()).square().mean() / wanted.float().square().mean()


@torch.no_grad()
def fit_outputs(layers: Mapping[int, Any], teacher: Any, batches: Iterable[Tensor]) -> None:
    """Set the output projections `o_proj` of new layers to the optimum of the loss, all else as it is.

    Args:
        layers: new layers by layer index, in float32.
        teacher: whole model.
        batches: token ids, int64 [B, T]; altogether several times as many tokens as a projection has inputs.
    """
    products: dict[int, Tensor] = {}
    for ids in batches:
        with recorded(teacher, list(layers)) as found:
            teacher(input_ids=ids, use_cache=False, logits_to_keep=1)
        for i, layer in layers.items():
            given, wanted = found[i]
            z = _projected(layer, given).float().flatten(0, 1)
            both = z.T @ torch.cat((z, wanted.float().flatten(0, 1)), 1)  # [inputs, inputs + D]: Z and Yᵀ
            products[i] = products[i].add_(both) if i in products else both
    for i, both in products.items():
        size = len(both)
        z, y = both.double().split((size, both.shape[1] - size), 1)
        z.diagonal().add_(_RIDGE * z.diagonal().mean())
        layers[i].o_proj.weight.copy_(torch.linalg.solve(z, y).T)


def _projected(layer: Any, given: Tensor) -> Tensor:
    """Return what the output projection of `layer` is given, [B, T, inputs]."""
    found: list[Tensor] = []
    handle = layer.o_proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    try:
        layer(given.to(next(layer.parameters()).dtype))
    finally:
        handle.remove()
    return found[0]
