"""Keep-index artifacts: which key-value groups and feed-forward channels stay, and which rows of which weight that is.

    layers.{i}.kv_groups      [G_keep]  kept key-value heads; each takes the query heads of its group with it
    layers.{i}.ffn_channels   [F_keep]  kept feed-forward channels

int64, sorted, in range, and equally many in every layer, so that the pruned model has an ordinary config. Either family
may be absent. The size of a head is never pruned: rotary embeddings pair its channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effpass.core.artifact import Artifact
from effpass.core.errors import ArtifactError, ModelError
from effpass.core.fingerprint import Fingerprint

__all__ = ["Axis", "Cut", "Dimensions", "KeepIndices", "Segment", "make_keep_artifact"]

PASS = "structured_pruning"
VERSION = 1

# The decoder's layers by the names of the families; a vision tower's are not among them.
_LAYER = re.compile(
    r"^(?:model\.(?:language_model\.)?layers|language_model\.layers|layers|(?:transformer\.)?h)\.(\d+)\.(.+)$"
)


@dataclass(frozen=True)
class Dimensions:
    """The sizes that index tensors refer to: H query heads, G key-value heads, K head size, F feed-forward width."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    num_hidden_layers: int

    @classmethod
    def of(cls, config: Any) -> Dimensions:
        """Of a transformers config; GPT-2's `n_inner` defaults to four times its width."""
        config = config.get_text_config()
        heads = config.num_attention_heads
        width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
        return cls(
            num_attention_heads=heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate_size=width,
            num_hidden_layers=config.num_hidden_layers,
        )


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
        axis: the same, as segments of units.
    """

    out: bool
    index: Tensor
    axis: Axis

    def dim(self, parameter_dims: int, transposed: bool) -> int:
        """The dimension that is cut, of a bias or of a matrix stored `[out, in]` or (`transposed`) `[in, out]`."""
        return 0 if parameter_dims == 1 else int(self.out == transposed)

    @property
    def old_size(self) -> int:
        return sum(s.old * s.inner for s in self.axis)


@dataclass(frozen=True)
class KeepIndices:
    """A validated keep-index artifact.

    Attributes:
        artifact: where it comes from.
        before: the sizes of the model it was learned for.
        kv_groups: per layer `[G_keep]`, or empty.
        ffn_channels: per layer `[F_keep]`, or empty.
    """

    artifact: Artifact
    before: Dimensions
    kv_groups: tuple[Tensor, ...]
    ffn_channels: tuple[Tensor, ...]

    @classmethod
    def load(cls, folder: Path) -> KeepIndices:
        """Read and validate.

        Raises:
            ArtifactError: see :class:`~effpass.core.artifact.Artifact`; or indices that are not sorted, unique, in
                range and equally many in every layer: names layer and value.
        """
        artifact = Artifact.load(folder, expect_pass=PASS, max_version=VERSION)
        try:
            before = Dimensions(**artifact.options)
            if not all(type(v) is int and v > 0 for v in asdict(before).values()):
                raise TypeError("sizes must be positive integers")
        except TypeError as error:
            raise ArtifactError(
                f"{folder}: options are {artifact.options!r}, expected the model's sizes: {error}"
            ) from None
        layers = range(before.num_hidden_layers)
        families = {}
        for family, size in (("kv_groups", before.num_key_value_heads), ("ffn_channels", before.intermediate_size)):
            names = [f"layers.{i}.{family}" for i in layers]
            here = [n for n in names if n in artifact.tensors]
            if here and (missing := [n for n in names if n not in artifact.tensors]):
                raise ArtifactError(
                    f"{folder}: {here[0]} is there and {missing[0]} is missing", hint="prune every layer alike"
                )
            families[family] = tuple(_check_index(folder, n, artifact.tensors[n], size) for n in here)
            counts = [len(t) for t in families[family]]
            if len(set(counts)) > 1:
                odd = next(i for i, c in enumerate(counts) if c != counts[0])
                raise ArtifactError(
                    f"{folder}: layer 0 keeps {counts[0]} {family} and layer {odd} keeps {counts[odd]}",
                    hint="keep equally many in every layer; another shape per layer needs a model class of its own",
                )
        known = {f"layers.{i}.{family}" for family in families for i in layers}
        if unknown := sorted(artifact.tensors.keys() - known):
            raise ArtifactError(f"{folder}: unknown tensor {unknown[0]!r} for {before.num_hidden_layers} layers")
        if not any(families.values()):
            raise ArtifactError(f"{folder}: neither kv_groups nor ffn_channels")
        return cls(artifact, before, families["kv_groups"], families["ffn_channels"])

    @property
    def after(self) -> Dimensions:
        """The sizes of the pruned model."""
        groups = len(self.kv_groups[0]) if self.kv_groups else self.before.num_key_value_heads
        per_group = self.before.num_attention_heads // self.before.num_key_value_heads
        channels = len(self.ffn_channels[0]) if self.ffn_channels else self.before.intermediate_size
        return Dimensions(groups * per_group, groups, self.before.head_dim, channels, self.before.num_hidden_layers)

    def cuts(self, names: Sequence[str]) -> dict[str, Cut]:
        """The parameters among `names` that are cut."""
        found = {}
        for name in names:
            match = _LAYER.match(name)
            if match is None or int(match[1]) >= self.before.num_hidden_layers:
                continue
            module, _, leaf = match[2].rpartition(".")
            cut = self._cut(int(match[1]), module)
            if cut is not None and (leaf == "weight" or (leaf == "bias" and cut.out)):
                found[name] = cut
        return found

    def _cut(self, layer: int, module: str) -> Cut | None:
        d = self.before
        per_group = d.num_attention_heads // d.num_key_value_heads
        if self.kv_groups and module in _ATTENTION:
            out, parts = _ATTENTION[module]
            units, kept = f"layers.{layer}.kv_groups", self.kv_groups[layer]
            inner = {"q": per_group * d.head_dim, "kv": d.head_dim}
            segments = tuple(Segment(d.num_key_value_heads, len(kept), inner[p], units, d.head_dim) for p in parts)
        elif self.ffn_channels and module in _MLP:
            out, count = _MLP[module]
            units, kept = f"layers.{layer}.ffn_channels", self.ffn_channels[layer]
            segments = (Segment(d.intermediate_size, len(kept), 1, units),) * count
        else:
            return None
        return Cut(out, _positions(segments, kept), segments)


# module → (outputs are cut, what its cut dimension holds)
_ATTENTION: dict[str, tuple[bool, tuple[str, ...]]] = {
    "self_attn.q_proj": (True, ("q",)),
    "self_attn.k_proj": (True, ("kv",)),
    "self_attn.v_proj": (True, ("kv",)),
    "self_attn.qkv_proj": (True, ("q", "kv", "kv")),  # Phi-3
    "self_attn.o_proj": (False, ("q",)),
    "attn.c_attn": (True, ("q", "kv", "kv")),  # GPT-2
    "attn.c_proj": (False, ("q",)),
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


def _positions(segments: Axis, kept: Tensor) -> Tensor:
    """Element positions of the kept units in a dimension of these segments."""
    found, start = [], 0
    for segment in segments:
        found.append((start + kept[:, None] * segment.inner + torch.arange(segment.inner)).flatten())
        start += segment.old * segment.inner
    return torch.cat(found)


def _check_index(folder: Path, name: str, index: Tensor, size: int) -> Tensor:
    if index.dtype != torch.int64 or index.dim() != 1 or index.numel() == 0:
        raise ArtifactError(f"{folder}: {name} is {index.dtype} {list(index.shape)}, expected int64 indices [n], n > 0")
    for position, value in enumerate(index.tolist()):
        if not 0 <= value < size:
            raise ArtifactError(f"{folder}: {name}[{position}] is {value}, expected 0 to {size - 1}")
        if position and value <= int(index[position - 1]):
            raise ArtifactError(
                f"{folder}: {name}[{position}] is {value} after {int(index[position - 1])}, expected ascending indices"
            )
    return index


def make_keep_artifact(
    model: nn.Module,
    folder: str | Path,
    *,
    kv_groups: int | Sequence[Sequence[int]] | None = None,
    ffn_channels: int | Sequence[Sequence[int]] | None = None,
    provenance: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> KeepIndices:
    """Write a keep-index artifact for `model`.

    Args:
        model: a transformers causal LM.
        folder: where to write it.
        kv_groups: the kept key-value heads of each layer, or how many to keep by magnitude.
        ffn_channels: the kept feed-forward channels of each layer, or how many to keep by magnitude.
        provenance: recorded in the artifact, as are `metrics`.
        metrics: see there.

    Returns:
        The artifact as :meth:`KeepIndices.load` reads it.

    Raises:
        ArtifactError: indices that a reader would refuse, or a folder that can't be written.
        ModelError: `model` has no unit of the kind that is to be pruned.

    The magnitude of a unit is ‖W_in‖ · ‖W_out‖ of the rows that make its values (of `v_proj`, `up_proj`) and the
    columns that read them (of `o_proj`, `down_proj`): what it can add to the residual stream at most.
    """
    before = Dimensions.of(getattr(model, "config", None))
    tensors = {}
    for family, given in (("kv_groups", kv_groups), ("ffn_channels", ffn_channels)):
        if given is None:
            continue
        for layer in range(before.num_hidden_layers):
            if isinstance(given, int):
                index = _largest(model, before, family, layer, given)
            else:
                if len(given) != before.num_hidden_layers:
                    raise ArtifactError(
                        f"{family} is given for {len(given)} layers, the model has {before.num_hidden_layers}"
                    )
                index = torch.tensor(list(given[layer]), dtype=torch.int64)
            tensors[f"layers.{layer}.{family}"] = index
    artifact = Artifact(
        PASS, VERSION, asdict(before), Fingerprint.of(model), dict(provenance or {}), dict(metrics or {}), tensors
    )
    # Checked as a reader will, before anything is written.
    for name, index in tensors.items():
        size = before.num_key_value_heads if name.endswith("kv_groups") else before.intermediate_size
        _check_index(Path(folder), name, index, size)
    artifact.save(folder)
    return KeepIndices.load(Path(folder))


@torch.no_grad()
def _largest(model: nn.Module, before: Dimensions, family: str, layer: int, count: int) -> Tensor:
    """The `count` units of one layer with the largest magnitude, ascending."""
    total = before.num_key_value_heads if family == "kv_groups" else before.intermediate_size
    if not 0 < count <= total:
        raise ArtifactError(f"{family}: {count} are to be kept of {total}, expected 1 to {total}")
    scores = []
    for name, module in model.named_modules():
        match = _LAYER.match(f"{name}.weight")
        part = match[2].removesuffix(".weight") if match and int(match[1]) == layer else ""
        table: Mapping[str, tuple[bool, Any]] = _ATTENTION if family == "kv_groups" else _MLP
        if part not in table or part.endswith(("q_proj", "k_proj", "gate_proj")):
            continue
        out, _ = table[part]
        weight = module.weight.float().T if type(module).__name__ == "Conv1D" else module.weight.float()  # type: ignore
        rows = weight if out else weight.T
        # A fused projection ends with the rows that make values.
        inner = rows.shape[0] // total if not out else before.head_dim if family == "kv_groups" else 1
        scores.append(rows[-inner * total :].reshape(total, -1).norm(dim=1))
    if len(scores) != 2:
        raise ModelError(f"layer {layer} has no weights to rank its {family} by", hint="give the indices")
    return (scores[0] * scores[1]).topk(count).indices.sort().values
