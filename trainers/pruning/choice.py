"""Choice of the units to keep from their scores: those with the highest scores, the same number in every layer."""

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
    """Compute scores `[L, R, N]` of each family with the module `method` of :mod:`effpass.trainers.pruning.scores`."""
    return importlib.import_module(f"effpass.trainers.pruning.scores.{method}").scores(model, units, calibration)


def best_units(
    scores: Mapping[str, Tensor], units: Mapping[str, Units], shapes: Shapes, sizes: Mapping[str, int]
) -> dict[str, dict[int, Tensor]]:
    """Return the indices `[R, n]` of the units with the highest scores, for each family and layer.

    Args:
        scores: scores `[L, R, N]` of each family.
        units: units of the model, by family.
        shapes: possible sizes of the pruned model.
        sizes: sizes of the pruned model.
    """
    found = {}
    for family, owned in units.items():
        best = scores[family].topk(shapes.count(owned, sizes), dim=-1).indices.sort(-1).values.cpu()
        found[family] = dict(zip(owned.readers, best.unbind(), strict=True))
    return found


def layer_count(cost: Cost, layers: int, keep: float) -> int:
    """Return the number of layers that keeps a share `keep` of the cost of all `layers`.

    Raises:
        EffpassError: no number of layers has this cost; the message has the nearest possible share.
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
    """Return the ascending indices of the `count` layers with the highest scores."""
    return layer_scores(model, units, calibration).topk(count).indices.sort().values.tolist()


# Maximum deviation of the kept share when whole layers are removed: half a layer out of sixteen.
_TOLERANCE = 0.032


def keep_indices(
    model: Any,
    units: Mapping[str, Units],
    kept: Mapping[str, Mapping[int, Tensor]] | None = None,
    layers: list[int] | None = None,
    **described: dict[str, Any],
) -> KeepIndices:
    """Create and validate a keep-index artifact for `model` in memory.

    Args:
        model: model to prune.
        units: units of the model, by family.
        kept: family → layer index → kept units `[R, n]`; None if whole layers are removed.
        layers: indices of the kept layers; None if no whole layers are removed.
        described: `provenance` and `metrics` of the artifact.
    """
    tensors = {} if layers is None else {"layers": torch.tensor(layers, dtype=torch.int64)}
    for family, of_layers in (kept or {}).items():
        for layer, index in of_layers.items():
            tensors[f"layers.{layer}.{family}"] = _stored(units[family], index)
    for part, whole in (("query_heads", "kv_groups"), ("expert_channels", "experts")):
        for name in [name for name in tensors if name.endswith(part)]:
            owner = name.replace(part, whole)
            if owner in tensors:  # only those of the kept groups and experts
                tensors[name] = tensors[name][tensors[owner]]
    sizes = asdict(Dimensions.of(model.config))
    artifact = Artifact(PASS, VERSION, sizes, Fingerprint.of(model), tensors=tensors, **described)
    return KeepIndices.of(artifact, Path("the kept units"))


def _stored(units: Units, index: Tensor) -> Tensor:
    """Convert kept units `[R, n]` to the shape that :mod:`effpass.passes.weights.prunable_units` defines."""
    if units.family == "experts":  # indices over all groups of the router
        return (index + torch.arange(units.rows)[:, None] * units.count).flatten()
    return index if units.family in ("query_heads", "expert_channels") else index[0]
