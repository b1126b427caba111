"""`fg2_gdn`: replace attention layers by linear attention, whose state has a fixed size for any sequence length.

    S_t = (I − κ_t κ_tᵀ) Diag(e^g_t) S_{t−1} + κ_t ζ_tᵀ        o_t = S_tᵀ q̂_t

S_t is the state of a value head after token t, o_t its output, and g_t the log of the decay; κ_t, ζ_t and q̂_t are
scaled keys, values and queries (:mod:`effpass.lowering.ops.gated_delta_rule`). The variant is FG²-GDN
(https://arxiv.org/abs/2604.19021), FG²-GDN+ (with separate step sizes for erasing and writing), Kimi Delta Attention or
gated DeltaNet, depending on the artifact, which `effpass train fg2-gdn` writes. The result is a hybrid model
(:mod:`effpass.runtime.linear_attention.hybrid`), which can be saved, loaded, exported and used for generation like the
original model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effpass.core.artifact import Artifact
from effpass.core.errors import ArtifactError, EffpassError, ModelError, PassRefusedError
from effpass.core.fingerprint import Fingerprint
from effpass.core.model import inner_model
from effpass.core.pass_ import Pass
from effpass.core.report import Refusal
from effpass.runtime.linear_attention import GatedDeltaAttention, GatedDeltaSettings, is_hybrid, make_hybrid
from effpass.runtime.linear_attention.attention_layers import attention_layers

__all__ = ["FG2GDN", "FG2GDNOptions", "Learned", "make_artifact"]

PASS, VERSION = "fg2_gdn", 1


@dataclass(frozen=True)
class FG2GDNOptions:
    """Options of `fg2_gdn`.

    Attributes:
        artifact: folder of learned layers written by `effpass train fg2-gdn`.
        layers: indices of the layers to replace, among those in the artifact; None for all of these.
    """

    artifact: Path
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Learned:
    """Contents of an artifact.

    Attributes:
        artifact: the artifact.
        settings: settings of the linear attention layers.
        layers: layer index → parameters of the layer by name.
        rest: other parameters of the model that were trained together with the layers, by name in the model.
    """

    artifact: Artifact
    settings: GatedDeltaSettings
    layers: dict[int, dict[str, Tensor]]
    rest: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path) -> Learned:
        """Read and validate an artifact.

        Raises:
            ArtifactError: the folder is not a valid :class:`Artifact`, or its tensors do not fit its settings.
        """
        artifact = Artifact.load(folder, expect_pass=PASS, max_version=VERSION)
        options = artifact.options
        numbers, described = options.get("layers"), options.get("settings")
        if not isinstance(numbers, list) or not numbers or not isinstance(described, Mapping):
            raise ArtifactError(f"{folder}: options are {options!r}, expected layers and settings")
        try:
            settings = GatedDeltaSettings.from_dict(described)
        except EffpassError as error:
            raise ArtifactError(f"{folder}: {error.message}", hint=error.hint) from error
        found: dict[int, dict[str, Tensor]] = {number: {} for number in numbers}
        rest: dict[str, Tensor] = {}
        for name, tensor in artifact.tensors.items():
            kind, _, inner = name.partition(".")
            number, _, parameter = inner.partition(".")
            if kind == "model":
                rest[inner] = tensor
            elif kind == "layers" and number.isdigit() and int(number) in found:
                found[int(number)][parameter] = tensor
            else:
                raise ArtifactError(
                    f"{folder}: unknown tensor {name!r}", hint="expected layers.<i>.<parameter> and model.<parameter>"
                )
        learned = cls(artifact, settings, found, rest)
        for layer in found:
            learned._check_layer(folder, layer)
        return learned

    def _check_layer(self, folder: Path, number: int) -> None:
        given = {name: tuple(tensor.shape) for name, tensor in self.layers[number].items()}
        with torch.device("meta"):
            like = GatedDeltaAttention(self.settings, self.hidden_size(number), number)
        wanted = {name: tuple(parameter.shape) for name, parameter in like.named_parameters()}
        for name in sorted({*given, *wanted}):
            if given.get(name) != wanted.get(name):
                raise ArtifactError(
                    f"{folder}: layers.{number}.{name} is {given.get(name, 'missing')}, and its settings make it"
                    f" {wanted.get(name, 'no parameter')}"
                )

    def hidden_size(self, number: int) -> int:
        """Return the hidden size D of a layer, read from its parameters; 0 if they do not determine it."""
        weight = self.layers[number].get("q_proj.weight")
        return 0 if weight is None or weight.dim() != 2 else weight.shape[1]


class FG2GDN(Pass):
    """Replaces attention layers by linear attention (FG²-GDN, KDA, gated DeltaNet) with learned weights."""

    name = PASS
    kind = "weights"
    changes = "layers"
    exact = False
    needs_artifact = True
    entrances = ("model",)  # a traced graph has neither the weights nor the cache of the new layers
    Options = FG2GDNOptions
    options: FG2GDNOptions
    _before: Sequence[str] = ()  # passes on weights that precede this one in its recipe

    @cached_property
    def learned(self) -> Learned:
        return Learned.load(self.options.artifact)

    @property
    def artifact(self) -> Artifact:
        return self.learned.artifact

    @property
    def layers(self) -> list[int]:
        """Indices of the layers to replace."""
        chosen = self.options.layers
        return sorted(self.learned.layers) if chosen is None else sorted(chosen)

    def check_beside(self, before: Sequence[Pass], behind: Sequence[Pass]) -> None:
        if any(isinstance(pass_, FG2GDN) for pass_ in before):
            raise PassRefusedError(
                "fg2_gdn occurs twice in the recipe, and the first one leaves a model with linear attention, which the"
                " second refuses",
                hint="train all layers together, into one artifact, or leave one of both out",
            )
        self._before = [pass_.name for pass_ in before if pass_.kind == "weights"]

    def check_model(self, model: nn.Module) -> None:
        runs, learned = inner_model(model), self.learned
        if self._before and learned.rest:
            raise PassRefusedError(
                f"the artifact of fg2_gdn holds weights of the whole model, and {self._before[0]} changes weights"
                " before it",
                hint=f"leave {self._before[0]} out, or give an artifact from before the whole model was trained",
            )
        if not hasattr(runs, "config"):
            raise ModelError(f"{type(runs).__name__} is no transformers model")
        if is_hybrid(runs.config):
            raise ModelError(
                f"{type(runs).__name__} has linear attention already",
                hint="leave fg2_gdn out of the recipe for a model that is converted",
            )
        self._check_choice()
        learned.artifact.check_model(runs)
        parameters = dict(runs.named_parameters(remove_duplicate=False))
        for index, (parent, name) in attention_layers(runs, self.layers).items():
            for key, weight in getattr(parent, name).named_parameters():
                if weight.is_meta or not weight.is_floating_point():
                    raise ModelError(
                        f"layer {index}: {name}.{key} is {'not in memory' if weight.is_meta else 'quantized'}",
                        hint="load the model whole and unquantized",
                    )
            if learned.hidden_size(index) != runs.config.hidden_size:
                raise ArtifactError(
                    f"layer {index} was learned for a width of {learned.hidden_size(index)}, and the model has"
                    f" {runs.config.hidden_size}"
                )
        for key, tensor in learned.rest.items():
            if key not in parameters or parameters[key].shape != tensor.shape:
                shape = tuple(parameters[key].shape) if key in parameters else "missing"
                raise ArtifactError(f"{key} is {shape} in the model, and {tuple(tensor.shape)} in the artifact")

    def _check_choice(self) -> None:
        learned, chosen = self.learned, self.layers
        if unknown := sorted(set(chosen) - set(learned.layers)):
            raise ArtifactError(
                f"layers: {', '.join(map(str, unknown))} of {list(chosen)} were not learned",
                hint=f"the artifact has {', '.join(map(str, sorted(learned.layers)))}",
            )
        if learned.rest and chosen != sorted(learned.layers):
            raise ArtifactError(
                "layers: the artifact holds weights of the rest of the model, trained with all of its layers in place",
                hint="leave layers out, or give an artifact from before the whole model was trained",
            )

    def note_on_cache(self, cache: Any, batch: int) -> str:
        settings, held = self.learned.settings, [cache.layers[index] for index in self.layers]
        before = sum(x.numel() * x.element_size() for layer in held for x in (layer.keys, layer.values))
        of_conv = (settings.conv_kernel_size - 1) * settings.channels * held[0].keys.element_size()
        after = len(held) * batch * (settings.state_bytes + of_conv)
        return (
            f"the cache of {len(held)} layer{'s' * (len(held) != 1)} takes {after / 1e6:.2f} MB at any number of"
            f" positions, in place of {before / 1e6:.2f} MB at {held[0].keys.shape[2]}"
        )

    def prepare(self, model: nn.Module) -> tuple[int, list[Refusal]]:
        """Replace the layers and load their learned weights; hits are layers."""
        runs, learned = inner_model(model), self.learned
        made = make_hybrid(runs, self.layers, learned.settings)
        for number, layer in made.items():
            layer.load_state_dict(learned.layers[number])
        with torch.no_grad():
            for name, tensor in learned.rest.items():
                runs.get_parameter(name).copy_(tensor)
        if (engine := getattr(runs, "effpass_engine", None)) is not None:
            engine.release()
        return len(made), []


def make_artifact(
    folder: str | Path,
    original: Fingerprint,
    layers: Mapping[int, GatedDeltaAttention],
    *,
    rest: Mapping[str, Tensor] | None = None,
    provenance: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Artifact:
    """Write learned layers as an artifact for this pass.

    Args:
        folder: folder to write; an existing artifact is replaced.
        original: fingerprint of the model before its layers were replaced.
        layers: learned layers by index, at least one, all with the same settings.
        rest: other parameters of the model that were trained, by name; None if there are none.
        provenance: origin of the layers, such as data, steps, seed and versions.
        metrics: quality of the layers.
    """
    settings = next(iter(layers.values())).settings
    tensors = {
        f"layers.{number}.{name}": parameter.detach()
        for number, layer in layers.items()
        for name, parameter in layer.named_parameters()
    }
    tensors |= {f"model.{name}": tensor.detach() for name, tensor in (rest or {}).items()}
    options = {"layers": sorted(layers), "settings": settings.to_dict()}
    artifact = Artifact(PASS, VERSION, options, original, dict(provenance or {}), dict(metrics or {}), tensors)
    artifact.save(folder)
    return artifact
