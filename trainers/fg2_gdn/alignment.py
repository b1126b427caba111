"""Loss of the first stage of a conversion: each new layer imitates the attention that it replaces.

    L = mean over layers of ‖new(x) − old(x)‖² / ‖old(x)‖²

x is the input of the old layer in the whole model. All layers are trained at the same time but independently of each
other, and no gradient passes through the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effpass.runtime.linear_attention.attention_layers import attention_layers

__all__ = ["alignment", "recorded"]


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
