"""C2T's classifier: how likely the target accepts a node of a draft's tree (https://arxiv.org/abs/2502.13652, 3).

    C = σ(w₂ · relu(W₁ (P, H, d) + b₁) + b₂)

P is the product of the draft's probabilities on the node's path, H the entropy (nats) of the distribution that the node
comes from, d its depth, 0 below the root. Learned by :mod:`effpass.trainers.c2t`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from effpass.core.artifact import Artifact, TensorSpec
from effpass.core.errors import ArtifactError

__all__ = ["ARTIFACT", "FEATURES", "VERSION", "Classifier", "load_classifier"]

FEATURES = 3
ARTIFACT, VERSION = "c2t", 1
_SIZES = ("top_k", "depth", "nodes", "beta")


class Classifier(nn.Module):
    """Logits `[...]` of being accepted, of features `[..., 3]`.

    Args:
        hidden: units; the paper's 48 are 241 parameters.

    Attributes:
        sizes: of trees that were found good where it was learned: `top_k`, `depth`, `nodes`, `beta`.
    """

    sizes: Mapping[str, float] = MappingProxyType({})

    def __init__(self, hidden: int = 48) -> None:
        super().__init__()
        self.inner = nn.Linear(FEATURES, hidden)
        self.outer = nn.Linear(hidden, 1)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Classifier:
        """From its parameters by name."""
        made = cls(len(tensors["inner.bias"]))
        made.load_state_dict(dict(tensors))
        return made.eval().requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        return self.outer(self.inner(features).relu()).squeeze(-1)

    def weights(self, device: torch.device) -> list[Tensor]:
        """W₁ `[h, 3]`, b₁ `[h]`, w₂ `[1, h]` and b₂ `[1]`, as :func:`~effpass.lowering.ops.tree_growth.confidence`
        takes them."""
        parameters = self.inner.weight, self.inner.bias, self.outer.weight, self.outer.bias
        return [p.detach().to(device, torch.float32).contiguous() for p in parameters]


def load_classifier(folder: Path, draft: nn.Module) -> Classifier:
    """The classifier that was learned for `draft`.

    Raises:
        ArtifactError: there is none, it is damaged, or it was learned for another draft.
    """
    names: dict[str, TensorSpec] = dict.fromkeys(Classifier(1).state_dict(), (None, torch.float32))
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no classifier there", hint="effpass train c2t MODEL --draft DRAFT learns one")
    artifact = Artifact.load(folder, expect_pass=ARTIFACT, max_version=VERSION, expect_tensors=names)
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
    return found
