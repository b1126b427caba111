"""Bytes read or predicted time of a decode step, as a function of the units that are kept.

A decode step of the model with all units is traced once (:mod:`effpass.core.inspection`). Each of its kernels belongs
to a module, and the bytes and the time of a kernel are taken as proportional to the kept shares of the units of that
module; the constant latency of a kernel remains. Experts that no token is routed to are not read. If the tokens of a
step are routed to fewer experts than there are, removing experts therefore saves nothing.
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
    """Return the cost of a decode step of `batch` sequences with a context of `context` positions.

    Args:
        model: model with all its units.
        units: units of the model, by family.
        unit: ``"bytes"`` for the bytes of weights and KV cache that a step reads, ``"latency"`` for its predicted time
            on the model's device.
        batch: batch size.
        context: number of positions in the KV cache.
    """
    at = ceilings(*device_and_dtype(model))
    few = "experts" in units and batch * model.config.get_text_config().num_experts_per_tok < _experts(units["experts"])
    is_latent = bool(Dimensions.of(model.config).latent_dim)  # the cache holds latents, of fixed size
    amounts: dict[tuple[str, ...], float] = {}
    outside = 0.0
    for part in decode_parts(model, at, batch, context):
        sizes = terms_of(_module(part), units)
        if few and _module(part).startswith("mlp.experts"):
            sizes = tuple(size for size in sizes if size != "experts")
        cache = () if is_latent else tuple(size for size in sizes if size == "kv_groups")
        latency = at.latency[part.kind]
        cut = sizes if part.kind == "matmul" else ()  # the weights of norms are not pruned
        read = [(cut, float(part.weight_bytes)), (cache, float(part.cache_bytes))]
        for key, amount in read if unit == "bytes" else [((), latency), (sizes, part.seconds - latency)]:
            amounts[key] = amounts.get(key, 0.0) + amount
            outside += amount if part.layer is None else 0.0
    name = "bytes of a step" if unit == "bytes" else "predicted time of a step"
    return Cost(name, tuple(Term(amount, sizes) for sizes, amount in sorted(amounts.items()) if amount), outside)


def _experts(units: Units) -> int:
    return units.rows * units.count


def _module(part: Part) -> str:
    """Return the module of a kernel inside its layer, as ``"self_attn.o_proj"``; empty for kernels outside layers."""
    if part.layer is None:
        return ""
    name = part.name.removeprefix(f"{part.layer[0]}.*").lstrip(".")
    # Attention kernels read the KV cache, whose size depends on the KV groups, as that of k_proj does.
    return "self_attn.k_proj" if part.kind == "attention" else name
