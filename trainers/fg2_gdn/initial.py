"""Choice of the layers to convert, and initialization of the new layers with the projections of the old attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from effpass.core.errors import ModelError
from effpass.runtime.linear_attention import GatedDeltaAttention, GatedDeltaSettings
from effpass.trainers.fg2_gdn.settings import Settings

__all__ = ["chosen_layers", "layer_settings", "projections", "start_from"]

# Names of a weight that holds the queries of all heads, then keys, then values, and of the output projection beside it:
# in Phi-3, and in GPT-2 and GPTBigCode.
_FUSED = (("qkv_proj", "o_proj"), ("c_attn", "c_proj"))


def chosen_layers(settings: Settings, count: int) -> list[int]:
    """Return the indices of the layers to convert.

    A share is spread evenly, and the last layer of each group is kept: with 3 in 4 layers to convert, every fourth
    layer is kept.

    Args:
        settings: settings of the conversion.
        count: number of layers of the model.

    Raises:
        ModelError: if the settings name layers that the model does not have, name a layer twice, or name none, or if
            the share is less than a layer.
    """
    if settings.layers is None:
        stays = round(count * (1 - settings.share))
        kept = {-(-count * (i + 1) // stays) - 1 for i in range(stays)} if stays else set()
        if len(kept) == count:
            raise ModelError(
                f"share: {settings.share:g} of {count} layers is none", hint=f"give at least {1 / count:.3f}, or layers"
            )
        return [i for i in range(count) if i not in kept]
    chosen = sorted(set(settings.layers))
    if not chosen or len(chosen) != len(settings.layers) or chosen[0] < 0 or chosen[-1] >= count:
        raise ModelError(f"layers: got {list(settings.layers)}", hint=f"numbers from 0 to {count - 1}, each once")
    return chosen


def layer_settings(settings: Settings, config: Any) -> GatedDeltaSettings:
    """Return settings of new layers whose heads equal the query heads of the model in number and size."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    size = getattr(text, "v_head_dim", None) or getattr(text, "head_dim", None) or text.hidden_size // heads
    return GatedDeltaSettings(
        settings.mode, heads, heads, size, size, settings.conv_kernel_size, settings.gate_rank, settings.beta_rank,
        settings.lower_bound,
    )  # fmt: skip


def projections(attention: nn.Module) -> dict[str, Tensor] | None:
    """Return the weights [out, in] of the query, key, value and output projections.

    None if the attention has no such projections, as with latent attention, or holds them in a form that is not known.
    """

    def weight(name: str) -> Tensor | None:
        module = getattr(attention, name, None)
        found = getattr(module, "weight", None)
        return (found.T if isinstance(module, Conv1D) else found) if isinstance(found, Tensor) else None

    output = next((x for name in ("o_proj", "out_proj", "dense", "c_proj") if (x := weight(name)) is not None), None)
    if output is None:
        return None
    queries = output.shape[1]
    fused = next((x for name, other in _FUSED if (x := weight(name)) is not None and hasattr(attention, other)), None)
    by_head = weight("query_key_value")  # Persimmon
    if getattr(attention, "multi_query", None) is False:  # GPTBigCode without shared keys
        fused, by_head = None, fused
    found: Any
    if fused is not None:
        shared = (fused.shape[0] - queries) // 2
        found = fused.split((queries, shared, shared))
    elif by_head is not None:  # for each head, its query, key and value
        found = (x.flatten(0, 1) for x in by_head.unflatten(0, (attention.num_heads, 3, -1)).unbind(1))
    else:
        found = tuple(weight(name) for name in ("q_proj", "k_proj", "v_proj"))
    given = dict(zip(("q_proj", "k_proj", "v_proj", "o_proj"), (*found, output), strict=True))
    return None if any(x is None for x in given.values()) else given


@torch.no_grad()
def start_from(layer: GatedDeltaAttention, attention: nn.Module) -> bool:
    """Initialize a new layer with the projections of `attention`, and its convolution with the identity.

    KV heads that several query heads share are repeated for each of them.

    Returns:
        Whether the attention has projections of matching sizes.
    """
    size = layer.settings.key_head_dim
    given = projections(attention)
    wanted = {name: getattr(layer, name).weight for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    if given is None or given["q_proj"].shape != wanted["q_proj"].shape:
        return False
    for name, weight in given.items():
        if weight.shape != wanted[name].shape:
            shared = weight.unflatten(0, (-1, size))
            weight = shared.repeat_interleave(wanted[name].shape[0] // weight.shape[0], dim=0).flatten(0, 1)
        wanted[name].copy_(weight)
    layer.conv.weight.zero_()[..., -1] = 1
    return True
