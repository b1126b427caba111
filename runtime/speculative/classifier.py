"""The classifier of C2T, which estimates the probability that the target accepts a node of a draft's tree.

    C = σ(w₂ · relu(W₁ (P, H, d) + b₁) + b₂)

P is the product of the draft's probabilities on the node's path, H the entropy (nats) of the distribution that the node
comes from, and d its depth, 0 directly below the root (https://arxiv.org/abs/2502.13652, section 3). It is trained by
:mod:`effpass.trainers.c2t` and used by :class:`~effpass.runtime.speculative.growing.C2T`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from effpass.core.artifact import Artifact, TensorSpec
from effpass.core.errors import ArtifactError

__all__ = ["ARTIFACT", "FEATURES", "VERSION", "Classifier", "load_classifier", "measured_on"]

log = logging.getLogger("effpass")

FEATURES = 3
ARTIFACT, VERSION = "c2t", 1
_SIZES = ("top_k", "depth", "nodes", "beta")


class Classifier(nn.Module):
    """Maps features (P, H, d) `[..., 3]` to logits `[...]` of being accepted.

    Args:
        hidden: number of hidden units; the paper's 48 give 241 parameters.

    Attributes:
        sizes: tree sizes that were found to work well in training, from `top_k`, `depth`, `nodes` and `beta`.
    """

    sizes: Mapping[str, float] = MappingProxyType({})

    def __init__(self, hidden: int = 48) -> None:
        super().__init__()
        self.inner = nn.Linear(FEATURES, hidden)
        self.outer = nn.Linear(hidden, 1)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Classifier:
        """Create a classifier from its parameters by name."""
        made = cls(len(tensors["inner.bias"]))
        made.load_state_dict(dict(tensors))
        return made.eval().requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        return self.outer(self.inner(features).relu()).squeeze(-1)

    def weights(self, device: torch.device) -> list[Tensor]:
        """Return W₁ `[h, 3]`, b₁ `[h]`, w₂ `[1, h]` and b₂ `[1]`, the arguments of
        :func:`~effpass.lowering.ops.tree_growth.confidence`."""
        parameters = self.inner.weight, self.inner.bias, self.outer.weight, self.outer.bias
        return [p.detach().to(device, torch.float32).contiguous() for p in parameters]


def measured_on(device: torch.device) -> str:
    """Return what an artifact calls the device that its sizes were measured on: the name of a GPU, or else the type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def load_classifier(folder: Path, draft: nn.Module | None = None, device: torch.device | None = None) -> Classifier:
    """Load a classifier from an artifact folder.

    Args:
        folder: folder that `effpass train c2t` wrote.
        draft: model or head that the classifier must belong to; None to load that of any draft.
        device: device to verify trees on. A warning is logged if the sizes were measured on another one; None for no
            warning.

    Raises:
        ArtifactError: if there is none, it is damaged, or it was trained for another draft.
    """
    names: dict[str, TensorSpec] = dict.fromkeys(Classifier(1).state_dict(), (None, torch.float32))
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder}: no classifier there",
            hint="effpass train c2t MODEL --draft DRAFT learns one; tree c2t:classifier=FOLDER names where it is",
        )
    artifact = Artifact.load(folder, expect_pass=ARTIFACT, max_version=VERSION, expect_tensors=names)
    if draft is not None:
        artifact.check_model(draft)
    try:
        found = Classifier.of(artifact.tensors)
    except RuntimeError as error:
        raise ArtifactError(f"{folder}: {' '.join(str(error).split())}") from error
    sizes = {name: artifact.options[name] for name in _SIZES if name in artifact.options}
    for name, value in sizes.items():
        if type(value) not in ((int, float) if name == "beta" else (int,)):
            raise ArtifactError(f"{folder}: options: {name} is {value!r}, expected a number")
    found.sizes = sizes
    there = artifact.provenance.get("device")
    if device is not None and there is not None and there != measured_on(device):
        log.warning(
            "effpass: nodes and β in %s were measured on %s, and this device is %s; effpass train c2t measures again",
            folder, there, measured_on(device),
        )  # fmt: skip
    return found
