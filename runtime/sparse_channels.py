"""Calibration for sparse attention: the key channels that contribute most to attention scores on a few texts.

    w_c = Σ_t Σ_h |q_thc k_tc|      over tokens t and the query heads h of a KV head; the C largest channels c are kept

q and k are queries and keys after rotation (Double Sparsity, https://arxiv.org/abs/2408.07092, section 3.1). With
latent attention (MLA) the channels are those of the absorbed query and of the cached latent. Sparse attention makes the
labels of keys (:mod:`effpass.lowering.ops.two_level_attention_index`) from these channels.

The artifact of `sparse_attention` (the folder that calibration writes) contains `layers.<i>.channels`, int32 [G, C] and
ascending, for each full-attention layer i with G KV heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effpass.core.artifact import Artifact
from effpass.core.errors import ArtifactError, EffpassError
from effpass.core.fingerprint import Fingerprint
from effpass.runtime.attention import reading_cache
from effpass.runtime.cache import DecodeCache, Reader
from effpass.runtime.engine import check_decodable
from effpass.runtime.latent_attention import Absorbed
from effpass.runtime.session import Session

__all__ = ["PASS", "calibrate", "check_channels", "load_channels"]

PASS, VERSION = "sparse_attention", 1


@dataclass
class _Recorder(Reader):
    """Accumulates channel weights while a model attends, as the reader of a cache.

    Attributes:
        sums: float64 `[G, K]` by layer index, the weights w_c.
    """

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
    """Find the channels that contribute most to attention scores on `prompts`.

    Args:
        model: a transformers causal LM, whose latent attention, if any, must have been absorbed.
        prompts: token ids of the calibration texts, int64 `[1, T]` each, without padding.
        channels: number of channels C to keep per KV head; must be even.
        provenance: description of the calibration data to store in the artifact; None for none.
        each: function that is called with the number of tokens of each prompt after it was run.

    Returns:
        The artifact, whose metric `share` is the fraction of the channel weights that the kept channels hold.

    Raises:
        EffpassError: if there are no prompts, `channels` is odd, or a key has fewer channels.
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
    """Load the artifact in `folder`, and return it with its channels by layer.

    Raises:
        ArtifactError: if the artifact can't be loaded, see :class:`Artifact`, or its tensors are not channels.
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


def check_channels(channels: dict[int, Tensor], layers: dict[int, tuple[int, int]]) -> None:
    """Raise an :class:`ArtifactError` unless there are valid channels for all layers of a model.

    Args:
        channels: channels by layer, from :func:`load_channels`.
        layers: (number of KV heads, key size) of each layer that needs channels, by layer index.
    """
    for index, (groups, size) in layers.items():
        found = channels.get(index)
        if found is None or found.shape[0] != groups or int(found.max()) >= size:
            shape = "none" if found is None else f"{list(found.shape)} up to {int(found.max())}"
            raise ArtifactError(
                f"channels of layer {index}: {shape}; the model has {groups} key-value heads of {size}",
                hint="calibrate again with this model",
            )
