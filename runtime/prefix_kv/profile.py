"""Profile of a model for PrefixKV: the share of its tokens that each layer keeps, for budgets from 2 % to 100 %.

`effpass calibrate prefix-kv` learns it on a few prompts (:mod:`effpass.runtime.prefix_kv.calibrate`) and saves it as an
artifact, the folder format of :mod:`effpass.core.artifact`, with these tensors:

    budgets    float32 [R]      budgets as shares of the tokens of all layers, ascending, the last one 1
    shares     float32 [R, L]   share of its tokens that each layer with full attention keeps at each budget
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effpass.core.artifact import Artifact
from effpass.core.errors import ArtifactError
from effpass.core.fingerprint import Fingerprint

__all__ = ["BUDGETS", "PASS", "Profile"]

PASS = "prefix_kv"
VERSION = 1
BUDGETS = (0.02, 0.05, *(i / 20 for i in range(2, 20)), 1.0)


@dataclass(frozen=True, eq=False)
class Profile:
    """A validated profile.

    Attributes:
        artifact: artifact that holds the tensors, with the fingerprint of the model they were learned for.
        budgets: float32 `[R]`, budgets as shares of the tokens, ascending.
        shares: float32 `[R, L]`, share of its tokens that each layer with full attention keeps at each budget.
    """

    artifact: Artifact
    budgets: Tensor
    shares: Tensor

    @classmethod
    def make(cls, model: nn.Module, shares: Tensor, options: dict[str, Any], provenance: dict[str, Any]) -> Profile:
        """Create a profile of `model` from the `shares` `[R, L]` of its layers at :data:`BUDGETS`."""
        budgets = torch.tensor(BUDGETS)
        tensors = {"budgets": budgets, "shares": shares.float()}
        artifact = Artifact(PASS, VERSION, options, Fingerprint.of(model), provenance=provenance, tensors=tensors)
        return cls(artifact, budgets, shares.float())

    @classmethod
    def load(cls, folder: Path) -> Profile:
        """Load a profile from an artifact folder and validate it.

        Raises:
            ArtifactError: if the folder is no valid artifact (see :class:`~effpass.core.artifact.Artifact`), or its
                tensors have other shapes or hold values that are no shares.
        """
        floats = (None, torch.float32)
        artifact = Artifact.load(
            folder, expect_pass=PASS, max_version=VERSION, expect_tensors={"budgets": floats, "shares": floats}
        )
        budgets, shares = artifact.tensors["budgets"], artifact.tensors["shares"]
        if budgets.dim() != 1 or shares.dim() != 2 or len(budgets) != len(shares) or not shares.numel():
            raise ArtifactError(
                f"{folder}: budgets {list(budgets.shape)} and shares {list(shares.shape)}, expected [R] and [R, L]"
            )
        if not bool((budgets.diff() > 0).all()) or float(budgets[0]) <= 0 or float(budgets[-1]) != 1:
            raise ArtifactError(f"{folder}: budgets are {budgets.tolist()}, expected shares that ascend to 1")
        wrong = ~((shares >= 0) & (shares <= 1))
        if bool(wrong.any()):
            budget, layer = wrong.nonzero()[0].tolist()
            raise ArtifactError(f"{folder}: shares[{budget}, {layer}] is {float(shares[budget, layer])}, no share")
        return cls(artifact, budgets, shares)

    def check(self, model: nn.Module, layers: int) -> None:
        """Raise :class:`ArtifactError` unless the profile fits `model`, which has `layers` full-attention layers."""
        self.artifact.check_model(model)
        if self.shares.shape[1] != layers:
            raise ArtifactError(
                f"the profile has {self.shares.shape[1]} layers, and the model {layers} with full attention"
            )

    def at(self, ratio: float) -> list[float]:
        """Interpolate the layers' shares at budget `ratio`; below the smallest budget they are proportional to it."""
        budgets, shares = self.budgets.double(), self.shares.double()
        if ratio <= float(budgets[0]):
            return (shares[0] * (ratio / budgets[0])).tolist()
        above = min(int(torch.searchsorted(budgets, torch.tensor(ratio, dtype=torch.float64))), len(budgets) - 1)
        part = (ratio - budgets[above - 1]) / (budgets[above] - budgets[above - 1])
        return torch.lerp(shares[above - 1], shares[above], part).tolist()
