"""Which units stay, by a method's scores: the best of each set, as many of every layer."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effpass.core.artifact import Artifact
from effpass.core.errors import EffpassError
from effpass.core.fingerprint import Fingerprint
from effpass.passes.weights.keep_indices import PASS, VERSION, KeepIndices
from effpass.passes.weights.prunable_units import Dimensions
from effpass.trainers.pruning.cost import Cost
from effpass.trainers.pruning.scores import Calibration
from effpass.trainers.pruning.scores.depth import layer_scores
from effpass.trainers.pruning.shapes import Shapes
from effpass.trainers.pruning.units import Units

__all__ = ["best_layers", "best_units", "keep_indices", "layer_count", "score_units"]


def score_units(method: str, model: Any, units: Mapping[str, Units], calibration: Calibration) -> dict[str, Tensor]:
    """Scores `[L, R, N]` of each family, by a file of :mod:`effpass.trainers.pruning.scores`."""
    return importlib.import_module(f"effpass.trainers.pruning.scores.{method}").scores(model, units, calibration)


def best_units(
    scores: Mapping[str, Tensor], units: Mapping[str, Units], shapes: Shapes, sizes: Mapping[str, int]
) -> dict[str, dict[int, Tensor]]:
    """Kept units `[R, n]`, by family and layer."""
    found = {}
    for family, owned in units.items():
        best = scores[family].topk(shapes.count(owned, sizes), dim=-1).indices.sort(-1).values.cpu()
        found[family] = dict(zip(owned.readers, best.unbind(), strict=True))
    return found


def layer_count(cost: Cost, layers: int, keep: float) -> int:
    """How many of so many layers stay.

    Raises:
        EffpassError: no number of layers costs what is to be kept; says the nearest.
    """
    count = min(range(1, layers), key=lambda n: abs(cost.depth_share(n, layers) - keep), default=layers)
    share = cost.depth_share(count, layers)
    if abs(share - keep) > _TOLERANCE:
        raise EffpassError(
            f"no number of layers keeps {keep:.3g} of the {cost.unit}: the nearest is {count} of {layers}, {share:.3f}",
            hint=f"--keep {share:.3f}",
        )
    return count


def best_layers(model: Any, units: Mapping[str, Units], calibration: Calibration, count: int) -> list[int]:
    """The `count` layers that matter most."""
    return layer_scores(model, units, calibration).topk(count).indices.sort().values.tolist()


# How far from what is asked for whole layers may be: half of one in sixteen.
_TOLERANCE = 0.032


def keep_indices(
    model: Any,
    units: Mapping[str, Units],
    kept: Mapping[str, Mapping[int, Tensor]] | None = None,
    layers: list[int] | None = None,
    **described: dict[str, Any],
) -> KeepIndices:
    """The choice as an artifact for `model`, checked as a reader will.

    Args:
        kept: units `[R, n]`.
        layers: kept layers, where whole layers go.
        described: the artifact's `provenance` and `metrics`.
    """
    tensors = {} if layers is None else {"layers": torch.tensor(layers, dtype=torch.int64)}
    for family, of_layers in (kept or {}).items():
        for layer, index in of_layers.items():
            tensors[f"layers.{layer}.{family}"] = _stored(units[family], index)
    for part, whole in (("query_heads", "kv_groups"), ("expert_channels", "experts")):
        for name in [name for name in tensors if name.endswith(part)]:
            owner = name.replace(part, whole)
            if owner in tensors:  # of the kept groups and experts alone
                tensors[name] = tensors[name][tensors[owner]]
    sizes = asdict(Dimensions.of(model.config))
    artifact = Artifact(PASS, VERSION, sizes, Fingerprint.of(model), tensors=tensors, **described)
    return KeepIndices.of(artifact, Path("the kept units"))


def _stored(units: Units, index: Tensor) -> Tensor:
    """As :mod:`effpass.passes.weights.prunable_units` shapes it."""
    if units.family == "experts":  # of all groups of the router, one after the other
        return (index + torch.arange(units.rows)[:, None] * units.count).flatten()
    return index if units.family in ("query_heads", "expert_channels") else index[0]
