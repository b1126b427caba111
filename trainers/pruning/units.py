"""The prunable units of a model in the layout of masks and scores: `[L, R, N]`, N units in each of R sets of L layers.

A layer has several sets of units in families whose units are chosen separately in each part of the layer, the same
number in each, such as the query heads of each KV group (:mod:`effpass.passes.weights.prunable_units`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from effpass.core.errors import EffpassError, ModelError, did_you_mean
from effpass.passes.weights.prunable_models import check_groups, check_heads
from effpass.passes.weights.prunable_units import FAMILIES, Dimensions, layers_with

__all__ = ["Units", "find_units"]

# Families whose sizes the config ties: the shared experts are a fixed multiple of an expert wide.
_TIED = {"shared_channels": "expert_channels"}


@dataclass(frozen=True)
class Units:
    """The units of one family.

    Attributes:
        family: name of the family.
        readers: layer index → name of the module whose inputs the units are, or which holds the experts.
        rows: number R of sets of units per layer.
        count: number N of units per set.
        width: number of inputs of the reader per unit; 0 if the reader is a stack of experts.
    """

    family: str
    readers: dict[int, str]
    rows: int
    count: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.readers), self.rows, self.count

    @property
    def size(self) -> str:
        """Name of the family whose kept share this family shares; usually its own."""
        return _TIED.get(self.family, self.family)

    def expanded(self, values: Tensor) -> Tensor:
        """Repeat values `[R, N]` of the units of a layer for each input of the reader."""
        return values.flatten().repeat_interleave(self.width)


def find_units(model: Any, families: Sequence[str] = ()) -> dict[str, Units]:
    """Return the prunable units of a model, by family.

    Args:
        model: transformers causal LM.
        families: families to return; empty for all that the model has, except query heads.

    Raises:
        EffpassError: a family is unknown.
        ModelError: the model has no prunable units of a family, or its query heads can't be divided into KV groups.
    """
    d = Dimensions.of(model.config)
    check_groups(d)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for family in families:
        if family not in FAMILIES:
            raise EffpassError(f"unknown units {family!r}{did_you_mean(family, FAMILIES)}")
    wanted = [f for f in FAMILIES if f in families or _TIED.get(f) in families] if families else _all(d, parameters)
    found = {}
    for family in wanted:
        readers = layers_with(family, parameters)
        rows, count = FAMILIES[family].rows(d), FAMILIES[family].units(d)
        if readers and count > 1:
            found[family] = Units(
                family, readers, rows, count, _width(model, family, next(iter(readers.values())), rows, count)
            )
        elif family in families:
            raise ModelError(f"{type(model).__name__} has no {family} to drop", hint="leave them out")
    if not found:
        raise ModelError(f"{type(model).__name__} has no units that are known here")
    check_heads(found, d, parameters)
    return found


def _all(d: Dimensions, parameters: dict[str, nn.Parameter]) -> list[str]:
    """Return all families except query heads, and without KV groups if the heads of the model can't be pruned."""
    wanted = [family for family in FAMILIES if family != "query_heads"]
    try:
        check_heads(wanted, d, parameters)
    except ModelError:
        wanted.remove("kv_groups")
    return wanted


def _width(model: nn.Module, family: str, reader: str, rows: int, count: int) -> int:
    if reader.endswith("mlp.experts"):
        return 0
    weight: Any = model.get_parameter(f"{reader}.weight")
    inputs = weight.shape[0] if type(model.get_submodule(reader)).__name__ == "Conv1D" else weight.shape[1]
    return inputs // (rows * count)
