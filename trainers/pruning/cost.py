"""Cost of a model as a function of the shares of its units that are kept, relative to the cost with all units.

The learner and the choice of shapes use it to meet a budget. The cost is a sum of terms, each of which is proportional
to the kept shares of some families of units; :func:`parameter_cost` counts parameters, and
:mod:`effpass.trainers.pruning.step_cost` counts bytes or time of a decode step.
"""

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
        amount: value of the term with all units.
        sizes: names of the families.
    """

    amount: float
    sizes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cost:
    """Cost as a sum of terms.

    Attributes:
        unit: name of what is counted, such as ``"parameters"``.
        terms: the terms.
        outside: part of the cost that lies outside the decoder layers.
    """

    unit: str
    terms: tuple[Term, ...]
    outside: float = 0.0

    def share(self, kept: Mapping[str, float]) -> float:
        """Return the relative cost if a share `kept` of each family is kept; families not named are kept whole."""
        left = sum(t.amount * prod(kept.get(size, 1.0) for size in t.sizes) for t in self.terms)
        return left / sum(t.amount for t in self.terms)

    def depth_share(self, kept: int, layers: int) -> float:
        """Return the relative cost if `kept` of `layers` layers are kept."""
        total = sum(t.amount for t in self.terms)
        return (self.outside + (total - self.outside) * kept / layers) / total

    def slope(self, kept: Mapping[str, float], size: str) -> float:
        """Return the relative cost of all units of the family `size`, given the `kept` shares of the other families."""
        return self.share({**kept, size: 1.0}) - self.share({**kept, size: 0.0})


def terms_of(module: str, units: Mapping[str, Units]) -> tuple[str, ...]:
    """Return the families whose kept shares scale the size of a module, such as ``"self_attn.o_proj"``."""
    found: tuple[str, ...] = ()
    if module.startswith(("self_attn", "attn")):
        if module.endswith(("q_proj", "q_b_proj", "o_proj", "c_proj", "qkv_proj", "c_attn")):
            found = ("kv_groups", "query_heads")
        elif module.endswith(("k_proj", "v_proj", "kv_b_proj", "attn")):  # also kernels around attention
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
    """Return the cost in parameters of the decoder layers. Embeddings and LM head are not pruned and not counted."""
    amounts: dict[tuple[str, ...], float] = {}
    for name, parameter in model.named_parameters():
        parts = split_name(name)
        if parts is not None:
            is_bias = parameter.ndim == 1 and parts[1].endswith(_READERS)  # a bias of outputs, which are not pruned
            sizes = () if is_bias else terms_of(parts[1], units)
            amounts[sizes] = amounts.get(sizes, 0) + parameter.numel()
    return Cost("parameters", _terms(amounts))


def _terms(amounts: Mapping[tuple[str, ...], float]) -> tuple[Term, ...]:
    return tuple(Term(amount, sizes) for sizes, amount in sorted(amounts.items()) if amount)
