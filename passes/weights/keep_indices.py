"""Keep-index artifacts: which units of a decoder's layers stay, and which rows of which weight that is.

    layers.{i}.{family}   int64: kept units of layer i, shaped as :mod:`effpass.passes.weights.prunable_units` says
    layers                int64 [L_keep]: kept layers; then there is nothing else

Indices are ascending, in range, and equally many in every layer that has such units, so that the pruned model has an
ordinary config. Families may be absent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effpass.core.artifact import Artifact
from effpass.core.errors import ArtifactError, did_you_mean
from effpass.core.fingerprint import Fingerprint
from effpass.passes.weights.prunable_units import FAMILIES, Dimensions, layers_with, split_name

__all__ = ["Axis", "Cut", "KeepIndices", "Segment", "make_keep_artifact"]

PASS = "structured_pruning"
VERSION = 1

_TENSOR = re.compile(r"^layers\.(\d+)\.(\w+)$")


@dataclass(frozen=True)
class Segment:
    """`old` units of `inner` elements, of which `new` stay.

    Attributes:
        units: name of the kept set, equal only to itself.
        head: size of the heads that lie in each unit; 1 where there are none, or where they have a dimension of their
            own.
    """

    old: int
    new: int
    inner: int
    units: str
    head: int = field(default=1, compare=False)


#: What becomes of one dimension: segments, one after the other.
Axis = tuple[Segment, ...]


@dataclass(frozen=True)
class Cut:
    """What becomes of one parameter.

    Attributes:
        out: True where outputs (rows of `[out, in]`, or a bias) are cut, False for inputs.
        index: kept positions of that dimension.
        old_size: of that dimension.
        axis: the same as segments of units, for graphs; empty where a segment has no units of one size.
    """

    out: bool
    index: Tensor
    old_size: int
    axis: Axis = ()

    def dim(self, parameter_dims: int, transposed: bool) -> int:
        """The dimension that is cut, of a bias or of a matrix stored `[out, in]` or (`transposed`) `[in, out]`."""
        return 0 if parameter_dims == 1 else int(self.out == transposed)


@dataclass(frozen=True)
class KeepIndices:
    """A validated keep-index artifact.

    Attributes:
        artifact: where it comes from.
        before: the sizes of the model it was learned for.
        units: family → layer → kept units.
        layers: kept layers, where whole layers go.
    """

    artifact: Artifact
    before: Dimensions
    units: Mapping[str, Mapping[int, Tensor]]
    layers: tuple[int, ...] = ()

    @classmethod
    def load(cls, folder: Path) -> KeepIndices:
        """Read and validate.

        Raises:
            ArtifactError: see :class:`~effpass.core.artifact.Artifact`; or indices that are not sorted, unique, in
                range and equally many in every layer: names layer and value.
        """
        return cls.of(Artifact.load(folder, expect_pass=PASS, max_version=VERSION), folder)

    @classmethod
    def of(cls, artifact: Artifact, folder: Path) -> KeepIndices:
        """As :meth:`load`, of an artifact that is in memory; `folder` is for messages."""
        try:
            before = Dimensions(**artifact.options)
            if not all(type(v) is int and v >= 0 for v in asdict(before).values()) or before.num_key_value_heads < 1:
                raise TypeError("sizes must be whole numbers")
        except TypeError as error:
            raise ArtifactError(
                f"{folder}: options are {artifact.options!r}, expected the model's sizes: {error}"
            ) from None
        if "layers" in artifact.tensors:
            if other := sorted(artifact.tensors.keys() - {"layers"}):
                raise ArtifactError(f"{folder}: keeps whole layers and {other[0]}", hint="prune either of them")
            kept = _checked(folder, "layers", artifact.tensors["layers"], before.num_hidden_layers, None)
            return cls(artifact, before, {}, tuple(kept.tolist()))
        units: dict[str, dict[int, Tensor]] = {}
        for name in artifact.tensors:
            match = _TENSOR.match(name)
            if match is None or match[2] not in FAMILIES or int(match[1]) >= before.num_hidden_layers:
                raise ArtifactError(f"{folder}: unknown tensor {name!r} for {before.num_hidden_layers} layers")
            units.setdefault(match[2], {})[int(match[1])] = artifact.tensors[name]
        if not units:
            raise ArtifactError(f"{folder}: no kept units", hint=f"one family at least: {', '.join(FAMILIES)}")
        result = cls(artifact, before, {f: dict(sorted(units[f].items())) for f in FAMILIES if f in units})
        for family in result.units:
            result._check_family(folder, family)
        return result

    def _check_family(self, folder: Path, family: str) -> None:
        d, found = self.before, self.units[family]
        size = FAMILIES[family].units(d) * (d.router_groups if family == "experts" else 1)
        if not size:
            raise ArtifactError(f"{folder}: the model has no {family}", hint="keep units that it has")
        for layer, index in found.items():
            rows = None
            if family in ("query_heads", "expert_channels"):
                owner = self.units.get("kv_groups" if family == "query_heads" else "experts", {})
                rows = len(owner[layer]) if layer in owner else FAMILIES[family].rows(d)
            _checked(folder, f"layers.{layer}.{family}", index, size, rows)
        counts = {layer: index.shape[-1] for layer, index in found.items()}
        first = next(iter(counts))
        odd = next((layer for layer in counts if counts[layer] != counts[first]), None)
        if odd is not None:
            raise ArtifactError(
                f"{folder}: layer {first} keeps {counts[first]} {family} and layer {odd} keeps {counts[odd]}",
                hint="keep equally many in every layer; another shape per layer needs a model class of its own",
            )
        if family == "experts" and d.router_groups > 1:
            per_group = d.num_experts // d.router_groups
            for layer, index in found.items():
                held = torch.bincount(index // per_group, minlength=d.router_groups)
                if held.min() != held.max():
                    raise ArtifactError(
                        f"{folder}: layers.{layer}.experts keeps {held.tolist()} of the router's {d.router_groups}"
                        " groups, expected equally many"
                    )
        if family in ("expert_channels", "shared_channels") and d.num_shared_experts:
            kept = {f: next(iter(self.units[f].values())).shape[-1] for f in _PAIR if f in self.units}
            if len(kept) < 2 or kept["shared_channels"] != d.num_shared_experts * kept["expert_channels"]:
                raise ArtifactError(
                    f"{folder}: keeps {kept}, and the shared experts are {d.num_shared_experts} times as wide as an"
                    " expert",
                    hint="prune both, in that proportion",
                )

    @property
    def after(self) -> Dimensions:
        """The sizes of the pruned model."""
        d, kept = self.before, {f: next(iter(found.values())) for f, found in self.units.items()}
        groups = len(kept["kv_groups"]) if "kv_groups" in kept else d.num_key_value_heads
        per_group = kept["query_heads"].shape[-1] if "query_heads" in kept else d.heads_per_group
        return replace(
            d,
            num_attention_heads=groups * per_group,
            num_key_value_heads=groups,
            intermediate_size=len(kept["ffn_channels"]) if "ffn_channels" in kept else d.intermediate_size,
            num_hidden_layers=len(self.layers) or d.num_hidden_layers,
            num_experts=len(kept["experts"]) if "experts" in kept else d.num_experts,
            expert_size=kept["expert_channels"].shape[-1] if "expert_channels" in kept else d.expert_size,
        )

    @property
    def fits_graphs(self) -> bool:
        """Whether a traced graph can be narrowed by it; the rest needs the model itself."""
        return self.units.keys() <= {"kv_groups", "ffn_channels"} and not self.layers and not self.before.latent_dim

    def kept(self, layer: int) -> dict[str, Tensor]:
        """The kept units of a layer, by family."""
        return {family: found[layer] for family, found in self.units.items() if layer in found}

    def cuts(self, names: Sequence[str]) -> dict[str, Cut]:
        """The parameters of linear layers among `names` that are cut."""
        found = {}
        for name in names:
            parts = split_name(name)
            if parts is not None:
                layer, module, leaf = parts
                cut = self._cut(layer, module)
                if cut is not None and (leaf == "weight" or (leaf == "bias" and cut.out)):
                    found[name] = cut
        return found

    def _cut(self, layer: int, module: str) -> Cut | None:
        d, kept = self.before, self.kept(layer)
        if module in _ATTENTION and kept.keys() & {"kv_groups", "query_heads"}:
            return self._attention_cut(layer, *_ATTENTION[module])
        family = "shared_channels" if "shared_experts" in module else "ffn_channels"
        if module.replace("shared_experts.", "") not in _MLP or family not in kept:
            return None
        out, count = _MLP[module.replace("shared_experts.", "")]
        size = FAMILIES[family].units(d)
        segments = (Segment(size, len(kept[family]), 1, f"layers.{layer}.{family}"),) * count
        index = torch.cat([kept[family] + i * size for i in range(count)])
        return Cut(out, index, size * count, segments)

    def _attention_cut(self, layer: int, out: bool, parts: tuple[str, ...]) -> Cut:
        d, kept = self.before, self.kept(layer)
        groups = kept.get("kv_groups", torch.arange(d.num_key_value_heads))
        own = kept.get("query_heads", torch.arange(d.heads_per_group).expand(len(groups), -1))
        heads = (groups[:, None] * d.heads_per_group + own).flatten()
        positions, segments, size = [], [], 0
        for part in parts:
            units, count, inner = {
                "q": (heads, d.num_attention_heads, d.head_dim),
                "kv": (groups, d.num_key_value_heads, d.latent_dim or d.head_dim),
                "o": (heads, d.num_attention_heads, d.value_dim or d.head_dim),
            }[part]
            positions.append((size + units[:, None] * inner + torch.arange(inner)).flatten())
            size += count * inner
            whole = d.num_key_value_heads
            segments.append(
                Segment(whole, len(groups), count // whole * inner, f"layers.{layer}.kv_groups", d.head_dim)
            )
        return Cut(out, torch.cat(positions), size, tuple(segments) if self.fits_graphs else ())


_PAIR = ("expert_channels", "shared_channels")

# module → (outputs are cut, what its cut dimension holds)
_ATTENTION: dict[str, tuple[bool, tuple[str, ...]]] = {
    "self_attn.q_proj": (True, ("q",)),
    "self_attn.q_b_proj": (True, ("q",)),  # latent attention
    "self_attn.k_proj": (True, ("kv",)),
    "self_attn.v_proj": (True, ("kv",)),
    "self_attn.kv_b_proj": (True, ("kv",)),  # latent attention
    "self_attn.qkv_proj": (True, ("q", "kv", "kv")),  # Phi-3
    "self_attn.o_proj": (False, ("o",)),
    "attn.c_attn": (True, ("q", "kv", "kv")),  # GPT-2
    "attn.c_proj": (False, ("o",)),
}
# module → (outputs are cut, how many times the channels follow each other)
_MLP: dict[str, tuple[bool, int]] = {
    "mlp.gate_proj": (True, 1),
    "mlp.up_proj": (True, 1),
    "mlp.gate_up_proj": (True, 2),  # Phi-3
    "mlp.down_proj": (False, 1),
    "mlp.c_fc": (True, 1),  # GPT-2
    "mlp.c_proj": (False, 1),
}


def _checked(folder: Path, name: str, index: Tensor, size: int, rows: int | None) -> Tensor:
    """`index`, `[n]` or `[rows, n]`, of units up to `size`."""
    shape = "[n]" if rows is None else f"[{rows}, n]"
    if index.dtype != torch.int64 or index.shape[:-1] != (() if rows is None else (rows,)) or index.numel() == 0:
        raise ArtifactError(
            f"{folder}: {name} is {index.dtype} {list(index.shape)}, expected int64 indices {shape}, n > 0"
        )
    for row, values in enumerate(index.view(-1, index.shape[-1]).tolist()):
        where = f"{name}[" if rows is None else f"{name}[{row}, "
        for position, value in enumerate(values):
            if not 0 <= value < size:
                raise ArtifactError(f"{folder}: {where}{position}] is {value}, expected 0 to {size - 1}")
            if position and value <= values[position - 1]:
                raise ArtifactError(
                    f"{folder}: {where}{position}] is {value} after {values[position - 1]}, expected ascending indices"
                )
    return index


def make_keep_artifact(
    model: nn.Module,
    folder: str | Path,
    *,
    provenance: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    layers: Sequence[int] | None = None,
    **units: Any,
) -> KeepIndices:
    """Write a keep-index artifact for `model`.

    Args:
        model: a transformers causal LM.
        folder: where to write it.
        provenance: recorded in the artifact, as are `metrics`.
        metrics: see there.
        layers: kept layers, where whole layers go.
        units: for each family how many units to keep by magnitude, or the kept ones: of every layer that has such
            units, in their order, or by layer.

    Returns:
        The artifact as :meth:`KeepIndices.load` reads it.

    Raises:
        ArtifactError: indices that a reader would refuse, or a folder that can't be written.
        ModelError: `model` has no unit of the kind that is to be pruned.
    """
    before = Dimensions.of(getattr(model, "config", None))
    tensors: dict[str, Tensor] = {}
    if layers is not None:
        tensors["layers"] = torch.tensor(list(layers), dtype=torch.int64)
    for family, given in units.items():
        if given is None:
            continue
        if family not in FAMILIES:
            raise ArtifactError(f"unknown units {family!r}{did_you_mean(family, FAMILIES)}")
        there = layers_with(family, [name for name, _ in model.named_parameters(remove_duplicate=False)])
        if isinstance(given, int):
            from effpass.passes.weights.magnitude import largest

            given = largest(model, family, given)
        if not isinstance(given, Mapping):
            if len(given) != len(there):
                raise ArtifactError(f"{family} is given for {len(given)} layers, the model has {len(there)}")
            given = dict(zip(there, given, strict=True))
        for layer, kept in given.items():
            tensors[f"layers.{layer}.{family}"] = torch.as_tensor(kept, dtype=torch.int64)
    artifact = Artifact(
        PASS, VERSION, asdict(before), Fingerprint.of(model), dict(provenance or {}), dict(metrics or {}), tensors
    )
    KeepIndices.of(artifact, Path(folder))  # as a reader will, before anything is written
    artifact.save(folder)
    return KeepIndices.load(Path(folder))
