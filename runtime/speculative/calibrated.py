"""Calibration of sparse verification: layers that choose blocks, and thresholds below which tokens skip experts.

Adjacent layers choose similar blocks of the prefix, so that an *anchor* layer can choose for the layers that follow it.
From the first layer up, a layer becomes the next anchor if the similarity of its choice to that of the last anchor is
below a limit ("Accelerate Speculative Decoding with Sparse Computation in Verification",
https://arxiv.org/abs/2512.21911). `effpass calibrate sparse-verification` calls :func:`calibrate`.

The artifact of `sparse_verification` holds `anchors`, int32 [A], ascending layer indices, and `expert_shares`, float32
[L, k - 1], for L layers with k experts per token (:mod:`effpass.runtime.speculative.token_rules`).
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
    """Measure a model and return an artifact with its anchors and expert shares.

    Args:
        model, samples, budgets, each: as for :func:`~effpass.runtime.speculative.redundancy.measure`.
        similarity: minimum Jaccard similarity of a layer's choice of blocks to the choice of its anchor.
        provenance: provenance to store in the artifact, along with the numbers of samples and tokens.

    Raises:
        EffpassError: as :func:`~effpass.runtime.speculative.redundancy.measure`.
    """
    found = measure(model, samples, budgets, each=each)
    shares = torch.tensor(list(found.expert_shares.values()), dtype=torch.float32)
    options = {"attention": found.budgets.attention, "block": found.budgets.block, "similarity": similarity}
    recorded = {**(provenance or {}), "samples": len(found.tokens), "tokens": sum(found.tokens)}
    tensors = {
        "anchors": torch.tensor(anchors_of(found, similarity), dtype=torch.int32),
        "expert_shares": shares if shares.numel() else torch.zeros(0, 0),
    }
    return Artifact(PASS, VERSION, options, Fingerprint.of(model), recorded, found.to_json(), tensors)


def anchors_of(found: Redundancy, least: float) -> list[int]:
    """Return the indices of the anchor layers, ascending, for a minimum similarity of `least`."""
    anchors: list[int] = []  # indices into `found.layers`
    for place in range(len(found.layers)):
        if not anchors or float(found.similar[anchors[-1], place]) < least:
            anchors.append(place)
    return [found.layers[place] for place in anchors]


def load_calibrated(folder: Path) -> Artifact:
    """Load and validate a calibration artifact.

    Raises:
        ArtifactError: if the folder is no valid artifact (see :class:`Artifact`), anchors do not ascend, or shares have
            a wrong shape or values outside [0, 1].
    """
    expected = {"anchors": (None, torch.int32), "expert_shares": (None, torch.float32)}
    artifact = Artifact.load(folder, expect_pass=PASS, max_version=VERSION, expect_tensors=expected)
    anchors, shares = artifact.tensors["anchors"], artifact.tensors["expert_shares"]
    if anchors.dim() != 1 or bool((anchors.diff() <= 0).any()) or (anchors.numel() and int(anchors[0]) < 0):
        raise ArtifactError(f"{folder}: anchors {anchors.tolist()} do not ascend from 0 on")
    if shares.dim() != 2 or not bool(((shares >= 0) & (shares <= 1)).all()):
        raise ArtifactError(f"{folder}: expert_shares {list(shares.shape)} are no shares of [layers, experts a token]")
    return artifact
