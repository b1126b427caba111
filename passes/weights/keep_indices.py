"""Keep-index artifacts: the units of a decoder that pruning keeps, and the parts of each weight that belong to them.

A *unit* is a part of a layer that can be removed, such as a KV group or a feed-forward channel; units of one kind form
a *family* (:mod:`effpass.passes.weights.prunable_units`). An artifact holds the tensors

    layers.{i}.{family}   int64, indices of the kept units of layer i, of the shape that the family has
    layers                int64 [L_keep], indices of the kept layers; such an artifact has no other tensors

Indices are ascending and in range. Every layer that has units of a family keeps the same number of them, so that the
pruned model has an ordinary config. Families that are not pruned are absent. `structured_pruning` applies artifacts,
and :mod:`effpass.trainers.pruning` learns them.
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
    """Consecutive units along a dimension.

    Attributes:
        old: number of units before pruning.
        new: number of units that are kept.
        inner: number of elements per unit.
        units: name of the set of kept units. Two segments with the same name keep the same units.
        head: size of the heads inside a unit; 1 if units contain no heads, or if heads have their own dimension.
    """

    old: int
    new: int
    inner: int
    units: str
    head: int = field(default=1, compare=False)


#: Pruning of one dimension: its segments in order.
Axis = tuple[Segment, ...]


@dataclass(frozen=True)
class Cut:
    """Pruning of one parameter.

    Attributes:
        out: whether outputs are pruned (rows of a matrix `[out, in]`, or a bias) instead of inputs.
        index: kept positions along the pruned dimension.
        old_size: size of that dimension before pruning.
        axis: the pruned dimension as segments of units, for graphs; empty for attention weights if traced graphs can't
            be pruned with the artifact.
    """

    out: bool
    index: Tensor
    old_size: int
    axis: Axis = ()

    def dim(self, parameter_dims: int, transposed: bool) -> int:
        """Return the pruned dimension of a bias, or of a matrix stored as `[out, in]` or (`transposed`) `[in, out]`."""
        return 0 if parameter_dims == 1 else int(self.out == transposed)


@dataclass(frozen=True)
class KeepIndices:
    """A validated keep-index artifact.

    Attributes:
        artifact: the artifact.
        before: sizes of the model for which it was learned.
        units: family → layer index → kept units.
        layers: indices of the kept layers if whole layers are removed; empty otherwise.
    """

    artifact: Artifact
    before: Dimensions
    units: Mapping[str, Mapping[int, Tensor]]
    layers: tuple[int, ...] = ()

    @classmethod
    def load(cls, folder: Path) -> KeepIndices:
        """Read and validate an artifact.

        Raises:
            ArtifactError: the folder is not a valid :class:`~effpass.core.artifact.Artifact`, or its indices are not
                sorted, unique, in range and of the same number in every layer; the message names layer and value.
        """
        return cls.of(Artifact.load(folder, expect_pass=PASS, max_version=VERSION), folder)

    @classmethod
    def of(cls, artifact: Artifact, folder: Path) -> KeepIndices:
        """Validate an artifact in memory, as :meth:`load` does; `folder` appears in error messages."""
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
        """Sizes of the pruned model."""
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
        """Whether a traced graph can be pruned with this artifact; if not, only the model itself can."""
        return self.units.keys() <= {"kv_groups", "ffn_channels"} and not self.layers and not self.before.latent_dim

    def kept(self, layer: int) -> dict[str, Tensor]:
        """Return the kept units of a layer by family."""
        return {family: found[layer] for family, found in self.units.items() if layer in found}

    def of_kept_heads(self, learned: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Select, from tensors [G, ...] learned per layer for each KV head, the entries of the kept KV heads.

        Latent attention has one cached head, which is never pruned.
        """
        kept = {} if self.before.latent_dim else self.units.get("kv_groups", {})
        return {layer: tensor[kept[layer]] if layer in kept else tensor for layer, tensor in learned.items()}

    def cuts(self, names: Sequence[str]) -> dict[str, Cut]:
        """Return the pruning of each parameter in `names` that belongs to a pruned linear layer."""
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

# module → (whether outputs are pruned, contents of the pruned dimension: query, KV or output heads)
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
# module → (whether outputs are pruned, number of times that the channels are repeated)
_MLP: dict[str, tuple[bool, int]] = {
    "mlp.gate_proj": (True, 1),
    "mlp.up_proj": (True, 1),
    "mlp.gate_up_proj": (True, 2),  # Phi-3
    "mlp.down_proj": (False, 1),
    "mlp.c_fc": (True, 1),  # GPT-2
    "mlp.c_proj": (False, 1),
}


def _checked(folder: Path, name: str, index: Tensor, size: int, rows: int | None) -> Tensor:
    """Validate and return `index`, `[n]` or `[rows, n]`, whose values must be below `size`."""
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
        folder: folder to write.
        provenance: origin of the indices, recorded in the artifact.
        metrics: quality of the pruned model, recorded in the artifact.
        layers: indices of the kept layers; None to remove no whole layers.
        units: for each family the number of units per layer to keep, those of largest magnitude; or the kept units,
            either as a sequence over the layers that have such units, or as a mapping from layer index. None for a
            family that is not pruned.

    Returns:
        The artifact as :meth:`KeepIndices.load` reads it.

    Raises:
        ArtifactError: the indices are invalid, or the folder can't be written.
        ModelError: `model` has no units of a family that is to be pruned by magnitude.
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
    KeepIndices.of(artifact, Path(folder))  # validate before anything is written
    artifact.save(folder)
    return KeepIndices.load(Path(folder))
