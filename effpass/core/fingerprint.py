"""Identity of the model that an artifact was learned for: its architecture, and a sketch of its weights.

The architecture consists of the model's class, its `model_type`, a table of its parameters (with layer numbers replaced
by `*`; used to name differences) and a hash of all names and shapes (which detects every difference). The weights are
sketched by a random projection. For up to 16 of them, evenly chosen, at most 65,536 evenly spaced elements x give

    norm = ‖x‖        projection = Σ sᵢ xᵢ,   sᵢ = ±1 fixed pseudo-random signs

The projections of two models whose elements differ by Δx differ by about ‖Δx‖. The root mean square of (p' − p) / norm
over the sketched weights, with p and p' the projections in both models, therefore estimates the relative change
‖ΔW‖ / ‖W‖: 0.14 % for SmolLM2 rounded to bfloat16, 0.02 % for float16. Norms or mean absolute values are not suitable,
because changes of either sign cancel in them: a fine-tune which moved the weights by 0.04 % moved their mean absolute
value by 0.002 %.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from effpass.core.errors import ArtifactError

__all__ = ["TOLERANCE", "Fingerprint", "Sketch"]

# Relative change of the weights above which they are regarded as those of another model; three times the change by
# rounding to bfloat16.
TOLERANCE = 0.004

_WEIGHTS = 16
_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Sketch:
    """Sketch of one weight.

    Attributes:
        norm: Euclidean norm of the sampled elements.
        projection: sum of the sampled elements with fixed pseudo-random signs.
    """

    norm: float
    projection: float


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a model.

    Attributes:
        architecture: name of the model's class.
        model_type: `model_type` of the model's config; empty if it has none.
        parameters: parameter name with layer numbers replaced by `*` → shape → number of such parameters:
            ``{"model.layers.*.mlp.up_proj.weight": {"1536x576": 30}}``.
        shapes: SHA-256 of all parameter names and shapes.
        weights: weight name → sketch; ``"any"`` accepts any weights of this architecture.
    """

    architecture: str
    model_type: str
    parameters: Mapping[str, Mapping[str, int]]
    shapes: str
    weights: Mapping[str, Sketch] | Literal["any"]

    @classmethod
    def of(cls, model: nn.Module, *, any_weights: bool = False) -> Fingerprint:
        """Compute the fingerprint of `model`. Tied weights are included under each of their names.

        Args:
            model: any module. Weights that are on the meta device, sharded or quantized are not sketched.
            any_weights: leave out the weights, for an artifact that does not depend on them.
        """
        model = getattr(model, "_orig_mod", model)
        named = sorted((name, weight) for name, weight in model.named_parameters(remove_duplicate=False))
        shapes = json.dumps([[name, list(weight.shape)] for name, weight in named])
        weights = {} if any_weights else {name: _sketch(weight) for name, weight in _chosen(named)}
        return cls(
            architecture=_architecture(model),
            model_type=str(getattr(getattr(model, "config", None), "model_type", "")),
            parameters=_table(named),
            shapes=hashlib.sha256(shapes.encode()).hexdigest(),
            weights=weights or "any",
        )

    def check(self, model: nn.Module) -> None:
        """Check that `model` is the one that was fingerprinted, up to a change of dtype.

        Weights that `model` does not hold as plain tensors in memory (meta device, sharded, quantized) are not
        compared.

        Raises:
            ArtifactError: the class, `model_type`, parameters or weights differ. The message names the difference.
        """
        difference = self._difference(Fingerprint.of(model, any_weights=True))
        if difference:
            raise ArtifactError(
                f"wrong model: {difference}",
                hint="use the model that the artifact was learned for, or learn it again for this one",
            )
        if self.weights != "any":
            self._check_weights(dict(getattr(model, "_orig_mod", model).named_parameters(remove_duplicate=False)))

    def _difference(self, here: Fingerprint) -> str | None:
        """Description of the first difference in architecture; None when there is none."""
        for what in ("architecture", "model_type"):
            if getattr(self, what) != getattr(here, what):
                return f"{what} is {getattr(here, what)!r}, the artifact was learned for {getattr(self, what)!r}"
        for name in sorted({*self.parameters, *here.parameters}):
            theirs, ours = (_in_words(fingerprint.parameters.get(name, {})) for fingerprint in (self, here))
            if theirs != ours:
                return f"{name} is {ours}, the artifact was learned for {theirs}"
        if self.shapes != here.shapes:  # the same shapes, but in other layers
            return f"hash of parameter names and shapes is {here.shapes}, the artifact was learned for {self.shapes}"
        return None

    def _check_weights(self, parameters: Mapping[str, nn.Parameter]) -> None:
        assert self.weights != "any"
        changes = {}
        sketches = {}
        for name, theirs in self.weights.items():
            if name not in parameters:
                raise ArtifactError(f"damaged fingerprint: it names {name!r}, which the model of its own hash lacks")
            if _in_memory(parameters[name]):
                sketches[name] = ours = _sketch(parameters[name])
                changes[name] = abs(ours.projection - theirs.projection) / max(theirs.norm, 1e-12)
        change = math.sqrt(sum(c * c for c in changes.values()) / len(changes)) if changes else 0.0
        if not change <= TOLERANCE:  # also when a weight is NaN
            name = max(changes, key=lambda n: changes[n] if changes[n] == changes[n] else math.inf)
            raise ArtifactError(
                f"wrong weights: they differ by about {change:.1%} from those that the artifact was learned for "
                f"(same architecture; {TOLERANCE:.1%} is allowed for rounding), most at {name!r}, whose projection is "
                f"{sketches[name].projection:.6g} and should be {self.weights[name].projection:.6g}",
                hint="use the model that the artifact was learned for; or, if you know that these weights will do, set "
                '"weights": "any" in the fingerprint in its effpass.json',
            )

    def to_json(self) -> dict[str, Any]:
        weights: Any = self.weights
        if weights != "any":
            weights = {name: [sketch.norm, sketch.projection] for name, sketch in weights.items()}
        return {
            "architecture": self.architecture,
            "model_type": self.model_type,
            "parameters": {name: dict(shapes) for name, shapes in self.parameters.items()},
            "shapes": self.shapes,
            "weights": weights,
        }

    @classmethod
    def from_json(cls, content: object) -> Fingerprint:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: `content` is not valid; the message says why.
        """
        types = {"architecture": str, "model_type": str, "parameters": dict, "shapes": str, "weights": object}
        if not isinstance(content, dict) or set(content) != set(types):
            raise ValueError(f"expected the keys {', '.join(types)}")
        for key, kind in types.items():
            if not isinstance(content[key], kind):
                raise ValueError(f"{key} is {content[key]!r}")
        if not all(isinstance(shapes, dict) for shapes in content["parameters"].values()):
            raise ValueError("parameters must hold a count for each shape")
        weights = content["weights"]
        if weights == "any":
            return cls(**content)
        if not isinstance(weights, dict):
            raise ValueError(f'weights is {weights!r}, expected "any" or sketches by name')
        for name, sketch in weights.items():
            if not (isinstance(sketch, list) and len(sketch) == 2 and all(type(v) in (int, float) for v in sketch)):
                raise ValueError(f"weights[{name!r}] is {sketch!r}, expected [norm, projection]")
        try:
            sketches = {name: Sketch(float(norm), float(projection)) for name, (norm, projection) in weights.items()}
        except OverflowError as error:
            raise ValueError(f"weights: {error}") from error
        return cls(**{**content, "weights": sketches})


def _table(named: Sequence[tuple[str, torch.Tensor]]) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for name, weight in named:
        shapes = table.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), {})
        shape = "x".join(map(str, weight.shape)) or "scalar"
        shapes[shape] = shapes.get(shape, 0) + 1
    return table


def _in_words(shapes: Mapping[str, int]) -> str:
    return " and ".join(f"{count} times {shape}" for shape, count in sorted(shapes.items())) or "missing"


def _architecture(model: nn.Module) -> str:
    """Name of the model's own class, without the class that fully_shard derives from it (``FSDPLlamaForCausalLM``)."""
    return next(c.__name__ for c in type(model).__mro__ if not c.__module__.startswith("torch.distributed."))


def _in_memory(weight: torch.Tensor) -> bool:
    plain = type(weight) in (torch.Tensor, nn.Parameter)  # not a DTensor, fake or quantized tensor
    return plain and not weight.is_meta and weight.is_floating_point() and weight.numel() > 0


def _chosen(named: Sequence[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Up to 16 weights, evenly spaced in name order.

    Only matrices are chosen, if there are any, since normalization weights and biases hardly differ between models.
    """
    held = [(name, weight) for name, weight in named if _in_memory(weight)]
    held = [(name, weight) for name, weight in held if weight.dim() >= 2] or held
    count = min(_WEIGHTS, len(held))
    return [held[i * len(held) // count] for i in range(count)]


@torch.no_grad()
def _sketch(weight: torch.Tensor) -> Sketch:
    flat = weight.detach().reshape(-1)
    sample = flat[:: -(-flat.numel() // _ELEMENTS)].cpu().double()
    signs = _signs(sample.numel())
    return Sketch(norm=sample.norm().item(), projection=(sample * signs).sum().item())


def _signs(count: int) -> torch.Tensor:
    """Signs ±1 from an integer hash of the position, which are the same on every machine and in every version."""
    h = torch.arange(count, dtype=torch.int64)
    h = (h * 0x9E3779B1) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x85EBCA77) & 0xFFFFFFFF
    h = h ^ (h >> 13)
    return 1.0 - 2.0 * (h & 1)
