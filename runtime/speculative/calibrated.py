"""What is calibrated for sparse verification: the layers that choose blocks, and shares by which tokens skip experts.

Adjacent layers choose alike, so that an *anchor* chooses for those behind it: going up, a layer whose choice is less
similar to the last anchor's than a limit is the next one ("Accelerate Speculative Decoding with Sparse Computation in
Verification", https://arxiv.org/abs/2512.21911).

An artifact of `sparse_verification` holds `anchors`, int32 [A], ascending, and `expert_shares`, float32 [L, k - 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effpass.core.artifact import Artifact
from effpass.core.errors import ArtifactError
from effpass.core.fingerprint import Fingerprint
from effpass.runtime.speculative.redundancy import Budgets, Redundancy, measure

__all__ = ["PASS", "anchors_of", "calibrate", "load_calibrated"]

PASS, VERSION = "sparse_verification", 1


def calibrate(
    model: Any,
    samples: Iterable[Tensor],
    budgets: Budgets | None = None,
    *,
    similarity: float = 0.6,
    provenance: dict[str, Any] | None = None,
    each: Callable[[int], None] = lambda tokens: None,
) -> Artifact:
    """Anchors and shares of `model`.

    Args:
        model, samples, budgets, each: as in :func:`~effpass.runtime.speculative.redundancy.measure`.
        similarity: of a layer's choice to its anchor's, at the least.
        provenance: kept in the artifact.

    Raises:
        EffpassError: see `measure`.
    """
    found = measure(model, samples, budgets, each=each)
    shares = torch.tensor(list(found.expert_shares.values()), dtype=torch.float32)
    options = {"attention": found.budgets.attention, "block": found.budgets.block, "similarity": similarity}
    told = {**(provenance or {}), "samples": len(found.tokens), "tokens": sum(found.tokens)}
    tensors = {
        "anchors": torch.tensor(anchors_of(found, similarity), dtype=torch.int32),
        "expert_shares": shares if shares.numel() else torch.zeros(0, 0),
    }
    return Artifact(PASS, VERSION, options, Fingerprint.of(model), told, found.to_json(), tensors)


def anchors_of(found: Redundancy, least: float) -> list[int]:
    """Layers that choose for themselves, ascending."""
    anchors: list[int] = []  # in the order of `similar`
    for place in range(len(found.layers)):
        if not anchors or float(found.similar[anchors[-1], place]) < least:
            anchors.append(place)
    return [found.layers[place] for place in anchors]


def load_calibrated(folder: Path) -> Artifact:
    """The artifact in `folder`.

    Raises:
        ArtifactError: see :class:`Artifact`; or tensors that can't be what they are named.
    """
    expected = {"anchors": (None, torch.int32), "expert_shares": (None, torch.float32)}
    artifact = Artifact.load(folder, expect_pass=PASS, max_version=VERSION, expect_tensors=expected)
    anchors, shares = artifact.tensors["anchors"], artifact.tensors["expert_shares"]
    if anchors.dim() != 1 or bool((anchors.diff() <= 0).any()) or (anchors.numel() and int(anchors[0]) < 0):
        raise ArtifactError(f"{folder}: anchors {anchors.tolist()} do not ascend from 0 on")
    if shares.dim() != 2 or not bool(((shares >= 0) & (shares <= 1)).all()):
        raise ArtifactError(f"{folder}: expert_shares {list(shares.shape)} are no shares of [layers, experts a token]")
    return artifact
