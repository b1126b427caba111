"""Magnitude of the weights of a prunable unit.

The magnitude is ‖W_in‖ · ‖W_out‖, where W_in are the rows that compute the values of the unit (in `v_proj` or
`up_proj`) and W_out are the columns that read them (in `o_proj` or `down_proj`). It bounds the contribution of the unit
to the residual stream. This is a baseline that uses no data; :mod:`effpass.trainers.pruning` has methods that do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effpass.core.errors import ArtifactError, ModelError
from effpass.passes.weights.lora_fold import stores_transposed
from effpass.passes.weights.prunable_units import FAMILIES, Dimensions, layers_with

__all__ = ["largest", "magnitudes"]


def largest(model: nn.Module, family: str, count: int) -> dict[int, Tensor]:
    """Return the ascending indices of the `count` units with the largest magnitude, for each layer.

    Raises:
        ArtifactError: `count` is out of range, or the layers have several sets of units of this family, so that one
            number of units is ambiguous.
        ModelError: the model has no such units.
    """
    found = magnitudes(model, family)
    for layer, scores in found.items():
        if scores.shape[0] != 1:
            raise ArtifactError(f"{family} of layer {layer} are {scores.shape[0]} sets", hint="give the indices")
        if not 0 < count <= scores.shape[1]:
            raise ArtifactError(
                f"{family}: {count} are to be kept of {scores.shape[1]}, expected 1 to {scores.shape[1]}"
            )
    return {layer: scores[0].topk(count).indices.sort().values for layer, scores in found.items()}


@torch.no_grad()
def magnitudes(model: nn.Module, family: str) -> dict[int, Tensor]:
    """Return the magnitude of each unit of a family, float32 `[rows, units]`, for each layer.

    Raises:
        ModelError: the model has no such units.
    """
    d = Dimensions.of(model.config)
    readers = layers_with(family, [name for name, _ in model.named_parameters(remove_duplicate=False)])
    if not readers:
        raise ModelError(f"{type(model).__name__} has no {family}", hint="prune other units")
    return {layer: _layer(model, d, family, name) for layer, name in readers.items()}


def _layer(model: nn.Module, d: Dimensions, family: str, reader: str) -> Tensor:
    rows, units = FAMILIES[family].rows(d), FAMILIES[family].units(d)
    parent = model.get_submodule(reader.rpartition(".")[0])
    if family in ("experts", "expert_channels"):
        stack: Any = model.get_submodule(reader)
        made, read = stack.gate_up_proj.float(), stack.down_proj.float()  # [E, 2 F, D], [E, D, F]
        each = made[:, made.shape[1] // 2 :].norm(dim=2) * read.norm(dim=1)
        return each if family == "expert_channels" else each.norm(dim=1).view(rows, units)
    read = _matrix(model.get_submodule(reader)).T  # [in, out]
    made = next(
        _matrix(getattr(parent, name))
        for name in ("v_proj", "qkv_proj", "kv_b_proj", "c_attn", "up_proj", "gate_up_proj", "c_fc")
        if hasattr(parent, name)
    )
    if family not in ("kv_groups", "query_heads"):
        return (made[-units:].norm(dim=1) * read.norm(dim=1))[None]  # the rows of up come last in a fused projection
    groups, size = d.num_key_value_heads, d.value_dim or d.head_dim
    made = (
        made.view(groups, d.latent_dim, -1)[:, -size:]
        if d.latent_dim
        else made[-groups * size :].view(groups, size, -1)
    )
    made, read = made.flatten(1).norm(dim=1), read.reshape(groups, -1, size * read.shape[1])
    if family == "kv_groups":
        return (made * read.flatten(1).norm(dim=1))[None]
    return made[:, None] * read.norm(dim=2)


def _matrix(module: Any) -> Tensor:
    """Return the weight as `[out, in]`, in float32."""
    return module.weight.float().T if stores_transposed(module) else module.weight.float()
