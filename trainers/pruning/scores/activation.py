"""Activation-weighted magnitude: the measure of Wanda (arXiv 2306.11695), summed over whole units.

    score = √ Σ_i (Σ x_i²) · ‖W_i‖²

i runs over the inputs of the unit in its reader, the linear layer whose inputs the units are; x_i² is summed over the
tokens of the calibration data, and W_i is the column of the reader's weight for input i. Up to a common factor, this is
the norm of the unit's contribution to the residual stream if its inputs are uncorrelated. The inputs of an expert are
those of the tokens that are routed to it, multiplied by the routing weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from effpass.passes.weights.lora_fold import stores_transposed
from effpass.trainers.pruning.scores import Calibration
from effpass.trainers.pruning.units import Units

__all__ = ["scores"]


@torch.no_grad()
def scores(model: Any, units: Mapping[str, Units], calibration: Calibration) -> dict[str, Tensor]:
    """Return the scores of all units; see :mod:`effpass.trainers.pruning.scores`."""
    readers = {reader: found for found in units.values() for reader in found.readers.values()}
    sums: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for reader, found in readers.items():
            hook = _linear if found.width else _experts
            handle = model.get_submodule(reader).register_forward_pre_hook(
                lambda m, args, r=reader, h=hook: h(m, args, sums, r)
            )
            stack.callback(handle.remove)
        for ids in calibration.batches:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    result = {}
    for family, found in units.items():
        layers = []
        for reader in found.readers.values():
            module: Any = model.get_submodule(reader)
            if found.width:
                weight = module.weight if stores_transposed(module) else module.weight.T  # [in, out]
                each = sums[reader] * weight.float().square().sum(1)
                layers.append(each.view(found.rows, found.count, found.width).sum(-1))
            else:
                each = sums[reader] * module.down_proj.float().square().sum(1)  # [E, F]
                layers.append(each if family == "expert_channels" else each.sum(1).view(found.rows, found.count))
        result[family] = torch.stack(layers).sqrt()
    return result


def _linear(module: Any, args: tuple[Tensor, ...], sums: dict[str, Tensor], reader: str) -> None:
    """Add the squares of the inputs of a linear layer, summed over tokens."""
    squares = args[0].float().square().flatten(0, -2).sum(0)
    sums[reader] = sums.get(reader, 0) + squares


def _experts(module: Any, args: tuple[Tensor, ...], sums: dict[str, Tensor], reader: str) -> None:
    """Add the squares of the inner activations of experts times the routing weights, summed over tokens, `[E, F]`."""
    hidden, chosen, weights = args
    found = torch.zeros(module.down_proj.shape[0], module.down_proj.shape[2], device=hidden.device)
    for expert in chosen.unique().tolist():
        token, place = torch.where(chosen == expert)
        gate, up = (hidden[token] @ module.gate_up_proj[expert].T).chunk(2, -1)
        inner = module.act_fn(gate) * up * weights[token, place, None].to(gate.dtype)
        found[expert] = inner.float().square().sum(0)
    sums[reader] = sums.get(reader, 0) + found
