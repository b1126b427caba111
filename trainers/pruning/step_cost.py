"""Bytes and predicted time of a decode step, and how they fall with the units: counted by the cost model.

A step of the model is traced once, with all units (:mod:`effpass.core.inspection`). Each of its kernels belongs to a
module; what it reads, computes and takes is proportional to the kept shares of the module's units. A kernel's latency
stays. Experts that no token chooses are not read: where a step chooses fewer than there are, their number saves
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from effpass.core.breakdown import Part
from effpass.core.inspection import decode_parts
from effpass.core.roofline import ceilings, device_and_dtype
from effpass.passes.weights.prunable_units import Dimensions
from effpass.trainers.pruning.cost import Cost, Term, terms_of
from effpass.trainers.pruning.units import Units

__all__ = ["step_cost"]


def step_cost(
    model: Any, units: Mapping[str, Units], unit: Literal["bytes", "latency"], batch: int, context: int
) -> Cost:
    """Of a decode step of `batch` sequences over `context` positions.

    Args:
        unit: `bytes` of weights and cache that are read, or `latency`, the predicted time on the model's device.
    """
    at = ceilings(*device_and_dtype(model))
    few = "experts" in units and batch * model.config.get_text_config().num_experts_per_tok < _experts(units["experts"])
    is_latent = bool(Dimensions.of(model.config).latent_dim)  # the cache is the latents', whatever reads them
    amounts: dict[tuple[str, ...], float] = {}
    outside = 0.0
    for part in decode_parts(model, at, batch, context):
        sizes = terms_of(_module(part), units)
        if few and _module(part).startswith("mlp.experts"):
            sizes = tuple(size for size in sizes if size != "experts")
        cache = () if is_latent else tuple(size for size in sizes if size == "kv_groups")
        latency = at.latency[part.kind]
        cut = sizes if part.kind == "matmul" else ()  # norms keep their weights
        read = [(cut, float(part.weight_bytes)), (cache, float(part.cache_bytes))]
        for key, amount in read if unit == "bytes" else [((), latency), (sizes, part.seconds - latency)]:
            amounts[key] = amounts.get(key, 0.0) + amount
            outside += amount if part.layer is None else 0.0
    name = "bytes of a step" if unit == "bytes" else "predicted time of a step"
    return Cost(name, tuple(Term(amount, sizes) for sizes, amount in sorted(amounts.items()) if amount), outside)


def _experts(units: Units) -> int:
    return units.rows * units.count


def _module(part: Part) -> str:
    """Inside the layer, ``"self_attn.o_proj"``; empty for kernels outside of layers."""
    if part.layer is None:
        return ""
    name = part.name.removeprefix(f"{part.layer[0]}.*").lstrip(".")
    # Attention and what stands around it read the cache of their groups.
    return "self_attn.k_proj" if part.kind == "attention" else name
