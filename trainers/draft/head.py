"""A new head for a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from effpass.core.errors import EffpassError, ModelError
from effpass.runtime.speculative.eagle_head import EagleHead, HeadConfig
from effpass.runtime.speculative.session import decoder_layers
from effpass.trainers.finetune.samples import Sample

__all__ = ["frequent_tokens", "head_config", "new_head"]

# Of the model's config, what its head's layer has as well.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
)


def head_config(config: Any, taps: tuple[int, ...] | None, vocabulary: int, layers: int) -> HeadConfig:
    """The shape of a head for a model of `config` with `layers` layers.

    Raises:
        EffpassError: a tap is no layer of the model.
        ModelError: the model's config lacks what a layer needs.
    """
    from transformers import LlamaConfig

    text = config.get_text_config(decoder=True)
    if taps is None:
        taps = (2, layers // 2, layers - 3) if layers > 5 else tuple(range(layers))
    if not taps or list(taps) != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] < layers:
        raise EffpassError(
            f"taps {list(taps)} of a model with {layers} layers", hint=f"name layers from 0 to {layers - 1}, ascending"
        )
    shared = {name: getattr(text, name) for name in _SHARED if getattr(text, name, None) is not None}
    missing = [name for name in ("hidden_size", "intermediate_size", "num_attention_heads") if name not in shared]
    if missing:
        raise ModelError(f"the config of {text.model_type} has no {missing[0]}, by which a head's layer is made")
    rope = shared.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_type" not in rope:  # kinds of layers that differ have one each
        shared["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    layer = LlamaConfig(**shared, num_hidden_layers=1, attention_bias=False, mlp_bias=False, tie_word_embeddings=False)
    return HeadConfig(layer, min(vocabulary, text.vocab_size), taps, norm_before_residual=True)


def frequent_tokens(samples: Sequence[Sample], count: int, vocabulary: int) -> torch.Tensor:
    """The `count` most frequent tokens of graded text, ascending; where there are fewer, the first others."""
    seen = np.zeros(vocabulary, dtype=np.int64)
    for sample in samples:
        np.add.at(seen, sample.tokens[sample.graded], 1)
    order = np.argsort(-seen, kind="stable")[:count]
    return torch.from_numpy(np.sort(order))


def new_head(model: Any, config: HeadConfig, tokens: torch.Tensor, seed: int) -> EagleHead:
    """A float32 head for `model`, whose rows of its output are the model's for `tokens` int64 `[U]`."""
    torch.manual_seed(seed)
    head = EagleHead(config)
    spread = getattr(config.layer, "initializer_range", 0.02)
    with torch.no_grad():
        for module in head.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=spread)
        if head.d2t is not None:
            head.choose_tokens(tokens)
        head.lm_head.weight.copy_(model.get_output_embeddings().weight[tokens.to(model.device)].float())
    head.share(model)
    return head.to(model.device)


def layers_of(model: Any) -> int:
    return len(decoder_layers(model))
