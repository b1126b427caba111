"""Which channels of its keys stand for a layer's keys: those that scores come from, on a few texts.

    w_c = Σ_t Σ_h |q_thc k_tc|      after rotation, over the query heads h of a key-value head; the C largest are kept

Double Sparsity (https://arxiv.org/abs/2408.07092), section 3.1. Of latents (MLA) the channels are those of the absorbed
query and of the cached latent.

An artifact of `sparse_attention` holds `layers.<i>.channels`, int32 [G, C], ascending, for each layer with full
attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effpass.core.artifact import Artifact
from effpass.core.errors import ArtifactError, EffpassError
from effpass.core.fingerprint import Fingerprint
from effpass.runtime.attention import reading_cache
from effpass.runtime.cache import DecodeCache, Reader
from effpass.runtime.engine import check_decodable
from effpass.runtime.latent_attention import Absorbed
from effpass.runtime.session import Session

__all__ = ["PASS", "calibrate", "load_channels"]

PASS, VERSION = "sparse_attention", 1


@dataclass
class _Recorder(Reader):
    """Looks on while a model attends, as the reader of a cache."""

    sums: dict[int, Tensor] = field(default_factory=dict)

    def attend(
        self, cache: DecodeCache, index: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float
    ) -> None:
        if cache.buffers(index).window:
            return
        tokens, groups = query.shape[2], keys.shape[1]
        q = query.float().unflatten(1, (groups, -1))
        products = (q * keys[:, :, -tokens:].float().unsqueeze(2)).abs().sum((0, 2, 3), dtype=torch.float64)
        self.sums[index] = self.sums.get(index, 0) + products

    def ready(self, cache: DecodeCache) -> None:
        return None

    def forget(self) -> None:
        return


def calibrate(
    model: Any,
    prompts: Iterable[Tensor],
    *,
    channels: int = 32,
    provenance: dict[str, Any] | None = None,
    each: Callable[[int], None] = lambda tokens: None,
) -> Artifact:
    """The channels that matter most on `prompts`.

    Args:
        model: a transformers causal LM; latent attention must have been absorbed.
        prompts: int64 `[1, T]` each, without padding.
        channels: how many are kept, C: an even number.
        provenance: kept in the artifact.
        each: called with the length of each prompt that was run.

    Raises:
        EffpassError: no prompts, or more channels than a key has.
    """
    check_decodable(model)
    if channels < 2 or channels % 2:
        raise EffpassError(f"channels is {channels}", hint="give an even number: two share a byte of a label")
    recorder, lengths = _Recorder(), []
    absorbed = [m for m in model.modules() if isinstance(m, Absorbed)]
    chunk = max((t for t in range(1, 512) if all(m.absorbs(t) for m in absorbed)), default=1) if absorbed else 4096
    with torch.inference_mode(False), torch.no_grad(), reading_cache(model):
        for ids in prompts:
            session = Session(model, 1, ids.shape[1], None)
            session.cache.reader = recorder  # type: ignore[assignment]
            session.begin(1)
            session.prefill(ids.to(model.device), None, chunk)
            lengths.append(ids.shape[1])
            each(ids.shape[1])
    if not lengths or not recorder.sums:
        raise EffpassError("there is nothing to calibrate with", hint="give text, and a model with full attention")
    tensors, shares = {}, {}
    for index, sums in sorted(recorder.sums.items()):
        if channels > sums.shape[1]:
            raise EffpassError(f"channels is {channels}, and a key of layer {index} has {sums.shape[1]}")
        best = sums.topk(channels, dim=1).indices.sort(1).values
        tensors[f"layers.{index}.channels"] = best.to(torch.int32)
        shares[str(index)] = float((sums.gather(1, best).sum() / sums.sum().clamp(min=1e-30)).cpu())
    told = {**(provenance or {}), "samples": len(lengths), "tokens": sum(lengths)}
    return Artifact(
        PASS, VERSION, {"channels": channels}, Fingerprint.of(model), told, {"share": shares}, tensors
    )  # fmt: skip


def load_channels(folder: Path) -> tuple[Artifact, dict[int, Tensor]]:
    """The artifact in `folder`, and its channels by layer.

    Raises:
        ArtifactError: see :class:`Artifact`; or tensors that are no channels.
    """
    artifact = Artifact.load(folder, expect_pass=PASS, max_version=VERSION)
    found = {}
    for name, tensor in artifact.tensors.items():
        prefix, _, rest = name.partition(".")
        number, _, what = rest.partition(".")
        if prefix != "layers" or not number.isdigit() or what != "channels":
            raise ArtifactError(f"{folder}: unknown tensor {name!r}", hint="expected layers.<i>.channels")
        if tensor.dtype != torch.int32 or tensor.dim() != 2 or tensor.shape[1] % 2 or not tensor.numel():
            raise ArtifactError(
                f"{folder}: {name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, expected int32"
                " [heads, an even number of channels]"
            )
        if bool((tensor.diff(dim=1) <= 0).any()) or int(tensor.min()) < 0:
            raise ArtifactError(f"{folder}: {name} does not ascend from 0 on")
        found[int(number)] = tensor
    if not found:
        raise ArtifactError(f"{folder}: holds no channels")
    return artifact, found


def check_channels(channels: dict[int, Tensor], model: nn.Module, layers: dict[int, tuple[int, int]]) -> None:
    """Raise :class:`ArtifactError` unless there are channels for each of `layers`: index → (heads, key size)."""
    for index, (groups, size) in layers.items():
        found = channels.get(index)
        if found is None or found.shape[0] != groups or int(found.max()) >= size:
            shape = "none" if found is None else f"{list(found.shape)} up to {int(found.max())}"
            raise ArtifactError(
                f"channels of layer {index}: {shape}; the model has {groups} key-value heads of {size}",
                hint="calibrate again with this model",
            )
