"""What a model costs with fewer units, as a share of what it costs with all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from effpass.passes.weights.prunable_units import split_name
from effpass.trainers.pruning.units import Units

__all__ = ["Cost", "Term", "parameter_cost", "terms_of"]

_READERS = ("o_proj", "c_proj", "down_proj")


@dataclass(frozen=True)
class Term:
    """A part of the cost that is proportional to the kept shares of some families.

    Attributes:
        amount: with all units.
        sizes: the families, by the names of their sizes.
    """

    amount: float
    sizes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cost:
    """A sum of terms.

    Attributes:
        unit: what is counted, ``"parameters"``.
        terms: see there.
        outside: how much of it is not in the decoder's layers.
    """

    unit: str
    terms: tuple[Term, ...]
    outside: float = 0.0

    def share(self, kept: Mapping[str, float]) -> float:
        """What is left of the cost where of each family a share `kept` stays (all, where it is not named)."""
        left = sum(t.amount * prod(kept.get(size, 1.0) for size in t.sizes) for t in self.terms)
        return left / sum(t.amount for t in self.terms)

    def depth_share(self, kept: int, layers: int) -> float:
        """What is left of the cost where `kept` of so many layers stay."""
        total = sum(t.amount for t in self.terms)
        return (self.outside + (total - self.outside) * kept / layers) / total

    def slope(self, kept: Mapping[str, float], size: str) -> float:
        """Cost, as a share of the whole, of all units of a family, the others being as they are."""
        return self.share({**kept, size: 1.0}) - self.share({**kept, size: 0.0})


def terms_of(module: str, units: Mapping[str, Units]) -> tuple[str, ...]:
    """The sizes that a module of a layer shrinks with, ``"self_attn.o_proj"``."""
    found: tuple[str, ...] = ()
    if module.startswith(("self_attn", "attn")):
        if module.endswith(("q_proj", "q_b_proj", "o_proj", "c_proj", "qkv_proj", "c_attn")):
            found = ("kv_groups", "query_heads")
        elif module.endswith(("k_proj", "v_proj", "kv_b_proj", "attn")):  # what stands around attention as well
            found = ("kv_groups",)
    elif module.startswith("mlp.experts"):
        found = ("experts", "expert_channels")
    elif module.startswith("mlp.shared_experts"):
        found = ("expert_channels",)
    elif module == "mlp.gate":
        found = ("experts",)
    elif module.startswith("mlp."):
        found = ("ffn_channels",)
    sizes = {u.size for u in units.values()}
    return tuple(size for size in found if size in sizes)


def parameter_cost(model: Any, units: Mapping[str, Units]) -> Cost:
    """Parameters of the decoder's layers; embeddings and head, which nothing is dropped from, are left out."""
    amounts: dict[tuple[str, ...], float] = {}
    for name, parameter in model.named_parameters():
        parts = split_name(name)
        if parts is not None:
            is_bias = parameter.ndim == 1 and parts[1].endswith(_READERS)  # of outputs, which stay
            sizes = () if is_bias else terms_of(parts[1], units)
            amounts[sizes] = amounts.get(sizes, 0) + parameter.numel()
    return Cost("parameters", _terms(amounts))


def _terms(amounts: Mapping[tuple[str, ...], float]) -> tuple[Term, ...]:
    return tuple(Term(amount, sizes) for sizes, amount in sorted(amounts.items()) if amount)
