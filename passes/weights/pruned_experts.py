"""Pruning of mixtures of experts: whole experts with their rows of the router, and channels of experts.

The router of the pruned model chooses among the remaining experts. Pruning experts is therefore equivalent to a router
that never chooses a removed expert, and not to removed experts that output zero. `structured_pruning` uses this module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effpass.core.errors import ModelError
from effpass.passes.weights.keep_indices import KeepIndices
from effpass.passes.weights.prunable_units import FAMILIES, layers_with, least_experts

__all__ = ["check_experts", "expert_layers", "prune_experts", "pruned_expert_shapes"]

_STACKED = {"gate_up_proj", "down_proj"}
_BIAS = "e_score_correction_bias"


def expert_layers(model: nn.Module, keep: KeepIndices) -> dict[int, str]:
    """Return the names of the mixtures of experts that `keep` prunes, by layer index."""
    if not keep.units.keys() & {"experts", "expert_channels"}:
        return {}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {layer: name.removesuffix(".experts") for layer, name in layers_with("experts", names).items()}


def check_experts(model: Any, keep: KeepIndices) -> None:
    """Raise a :class:`ModelError` if experts have an unsupported form, or if too few would remain for the router."""
    for name in expert_layers(model, keep).values():
        block = model.get_submodule(name)
        stacked = {n for n, _ in block.experts.named_parameters()}
        if stacked != _STACKED or block.experts.is_transposed or not block.experts.is_concatenated:
            raise ModelError(f"{name}.experts keeps its weights in another form ({', '.join(sorted(stacked))})")
        routing = {n for n, _ in block.gate.named_parameters()}
        if routing != {"weight"}:
            raise ModelError(f"{name}.gate has {', '.join(sorted(routing))}, expected a router with one weight")
    least, groups = least_experts(model.config) if "experts" in keep.units else 0, keep.before.router_groups
    if keep.after.num_experts < least * groups:
        raise ModelError(
            f"{keep.after.num_experts} experts are too few: the router chooses from {least * groups} at least",
            hint="keep more experts",
        )


def pruned_expert_shapes(model: nn.Module, keep: KeepIndices) -> dict[str, tuple[int, ...]]:
    """Return the shapes that :func:`prune_experts` gives to parameters, by name."""
    after = keep.after
    found: dict[str, tuple[int, ...]] = {}
    for name in expert_layers(model, keep).values():
        block: Any = model.get_submodule(name)
        width = block.experts.down_proj.shape[1]
        found[f"{name}.experts.gate_up_proj"] = (after.num_experts, 2 * after.expert_size, width)
        found[f"{name}.experts.down_proj"] = (after.num_experts, width, after.expert_size)
        found[f"{name}.gate.weight"] = (after.num_experts, block.gate.weight.shape[1])
    return found


def prune_experts(model: nn.Module, keep: KeepIndices) -> int:
    """Prune the mixtures of experts of `model` in place, and return their number."""
    d, layers = keep.before, expert_layers(model, keep)
    for layer, name in layers.items():
        block: Any = model.get_submodule(name)
        experts, gate, kept = block.experts, block.gate, keep.kept(layer)
        chosen = kept.get("experts", torch.arange(d.num_experts)).to(experts.down_proj.device)
        every = torch.arange(FAMILIES["expert_channels"].units(d)).expand(len(chosen), -1)
        channels = kept.get("expert_channels", every).to(chosen.device)
        up = experts.gate_up_proj.detach()[chosen].unflatten(1, (2, -1))  # [E, 2, F, D]
        up = up.gather(2, channels[:, None, :, None].expand(-1, 2, -1, up.shape[3])).flatten(1, 2)
        down = experts.down_proj.detach()[chosen]  # [E, D, F]
        down = down.gather(2, channels[:, None].expand(-1, down.shape[1], -1))
        for owner, leaf, value in (
            (experts, "gate_up_proj", up),
            (experts, "down_proj", down),
            (gate, "weight", gate.weight.detach()[chosen]),
        ):
            setattr(owner, leaf, nn.Parameter(value, requires_grad=getattr(owner, leaf).requires_grad))
        if isinstance(getattr(gate, _BIAS, None), Tensor):
            setattr(gate, _BIAS, getattr(gate, _BIAS)[chosen])
        for module in (block, experts, gate):
            if module.__dict__.get("num_experts") == d.num_experts:
                module.num_experts = len(chosen)
        experts.intermediate_dim = channels.shape[1]
    return len(layers)
