"""Checks that a model can be pruned with a keep-index artifact, and updates of the sizes that its modules store.

`structured_pruning` runs the checks before it changes anything. An artifact prunes units of a layer, such as KV groups
or channels, which :mod:`effpass.passes.weights.prunable_units` defines.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from effpass.core.errors import ModelError
from effpass.passes.weights.dropped_layers import kept_names, write_layers
from effpass.passes.weights.keep_indices import Cut, KeepIndices
from effpass.passes.weights.lora_fold import stores_transposed
from effpass.passes.weights.prunable_units import FAMILIES, Dimensions, layers_with, write_sizes
from effpass.passes.weights.pruned_experts import pruned_expert_shapes

__all__ = ["check_groups", "check_heads", "check_result", "check_units", "set_sizes"]


def check_groups(before: Dimensions) -> None:
    """Raise a :class:`ModelError` if the number of query heads is not a multiple of the number of KV heads."""
    heads, groups = before.num_attention_heads, before.num_key_value_heads
    if heads % groups:
        raise ModelError(
            f"{heads} query heads can't be paired with {groups} key-value heads: each needs as many",
            hint="num_attention_heads of the config must be a multiple of num_key_value_heads",
        )


def check_heads(families: Collection[str], before: Dimensions, parameters: Mapping[str, Any]) -> None:
    """Check that the heads of a model can be pruned, if `families` contains heads.

    Args:
        families: families of units to prune.
        before: sizes of the model.
        parameters: parameters of the model, or of one of its graphs, by name.

    Raises:
        ModelError: heads can't be pruned; the message has the reason.
    """
    if not {"kv_groups", "query_heads"} & set(families):
        return
    check_groups(before)
    if any(".attn.c_attn." in name for name in parameters):
        raise ModelError(
            "heads of GPT-2 can't be pruned: their size is width / heads, so a config with fewer heads describes"
            " another model",
            hint="prune ffn_channels only",
        )
    if "query_heads" in families and before.heads_per_group == 1:
        raise ModelError("each query head is the only one of its group", hint="prune kv_groups instead of query_heads")
    for end in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
        name = next((n for n in parameters if n.endswith(end)), None)
        if name is not None and parameters[name].shape[0] != before.head_dim:
            raise ModelError(
                f"{name} normalizes over all heads together, so that dropping a head changes every other one",
                hint="prune ffn_channels only",
            )


def check_units(model: nn.Module, keep: KeepIndices) -> None:
    """Raise a :class:`ModelError` unless the artifact prunes exactly the layers that have units of each family."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    there = {family: layers_with(family, names) for family in FAMILIES}
    for family, found in keep.units.items():
        if odd := sorted(found.keys() ^ there[family].keys()):
            what = "has" if odd[0] in there[family] else "has no"
            readers = " or ".join(FAMILIES[family].readers)
            raise ModelError(
                f"layer {odd[0]} {what} {readers}, whose units are {family}"
                + ("" if odd[0] in found else ", and the artifact leaves it out"),
                hint=f"this model has {', '.join(f for f in FAMILIES if there[f])}; prune every layer alike",
            )


def check_result(model: Any, keep: KeepIndices, cuts: dict[str, Cut]) -> None:
    """Check that the model class accepts the pruned sizes and gives every parameter the shape that slicing gives it.

    The pruned architecture is created from its config on the meta device.

    Args:
        model: transformers model to prune.
        keep: artifact to prune with.
        cuts: parameter name → pruning of the parameter.

    Raises:
        ModelError: the model class does not accept the sizes, or a parameter has another shape.
    """
    smaller: Any = copy.deepcopy(model.config)
    try:
        if keep.layers:
            write_layers(smaller, keep.layers)
        write_sizes(smaller, keep.after)
        smaller = type(smaller).from_dict(smaller.to_dict())
        with torch.device("meta"):
            expected: nn.Module = type(model)(smaller)
    except Exception as error:  # a model class may raise any exception for sizes that it does not support
        reason = str(error).strip().splitlines()[-1]
        raise ModelError(
            f"{type(model).__name__} accepts no config of {_told(keep)}: {reason}", hint="keep another number of units"
        ) from error
    shapes = {n: tuple(p.shape) for n, p in expected.named_parameters(remove_duplicate=False)}
    stacked = pruned_expert_shapes(model, keep)
    new_names = kept_names(model, keep.layers) if keep.layers else None
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if new_names is not None and name not in new_names:
            continue
        shape = list(parameter.shape)
        if name in cuts:
            module = model.get_submodule(name.rpartition(".")[0])
            dim = cuts[name].dim(parameter.dim(), stores_transposed(module))
            shape[dim] = len(cuts[name].index)
        new = name if new_names is None else new_names[name]
        given = stacked.get(name, tuple(shape))
        if shapes.get(new) != given:
            raise ModelError(
                f"{type(model).__name__} with the pruned sizes has {new} of shape {shapes.get(new)}, slicing gives"
                f" {given}: this architecture uses the pruned sizes in another way",
                hint="report the architecture",
            )


def _told(keep: KeepIndices) -> str:
    """Describe the sizes that `keep` changes, for error messages."""
    before, after = asdict(keep.before), asdict(keep.after)
    names = {
        "num_attention_heads": "query heads",
        "num_key_value_heads": "key-value heads",
        "intermediate_size": "feed-forward channels",
        "num_experts": "experts",
        "expert_size": "channels of an expert",
        "num_hidden_layers": "layers",
    }
    changed = [f"{after[size]} {what}" for size, what in names.items() if after[size] != before[size]]
    return ", ".join(changed) or "the same sizes"


def set_sizes(model: Any, keep: KeepIndices) -> None:
    """Write the pruned sizes into the config, which all modules share, and into attributes of modules that copy it."""
    write_sizes(model.config, keep.after)
    before, after = keep.before, keep.after
    sizes = {
        "num_heads": (before.num_attention_heads, after.num_attention_heads),
        "num_attention_heads": (before.num_attention_heads, after.num_attention_heads),
        "num_key_value_heads": (before.num_key_value_heads, after.num_key_value_heads),
        "num_key_value_groups": (before.heads_per_group, after.heads_per_group),
    }
    own = {
        "mlp": (before.intermediate_size, after.intermediate_size),
        "shared_experts": tuple(d.num_shared_experts * d.expert_size for d in (before, after)),
    }
    for path, module in model.named_modules():
        end = path.rpartition(".")[2]
        changes = sizes if end in ("self_attn", "attn") else {"intermediate_size": own[end]} if end in own else {}
        for attribute, (old, new) in changes.items():
            if module.__dict__.get(attribute) == old:
                setattr(module, attribute, new)
