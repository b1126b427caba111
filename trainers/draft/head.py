"""Creation of a new EAGLE-3 head for a model, to be trained by :mod:`effpass.trainers.draft.run`."""

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

# Fields of the model's config that are copied to the config of the head's layer.
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
    """Return the config of a head for a model.

    Args:
        config: config of the model.
        taps: indices of the layers whose inputs are the features, ascending; None for layers 2, `layers // 2` and
            `layers - 3`, or all if there are at most 5.
        vocabulary: maximum size of the draft's vocabulary.
        layers: number of layers of the model.

    Raises:
        EffpassError: if taps are not ascending, or a tap is no layer of the model.
        ModelError: if the model's config lacks a size that the head's layer needs.
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
    if not isinstance(rope, dict) or "rope_type" not in rope:  # a dict per kind of layers
        shared["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    layer = LlamaConfig(**shared, num_hidden_layers=1, attention_bias=False, mlp_bias=False, tie_word_embeddings=False)
    return HeadConfig(layer, min(vocabulary, text.vocab_size), taps, norm_before_residual=True)


def frequent_tokens(samples: Sequence[Sample], count: int, vocabulary: int) -> torch.Tensor:
    """Return the `count` most frequent tokens of graded text, ascending.

    If the text has fewer distinct tokens, the lowest other token ids are added.
    """
    seen = np.zeros(vocabulary, dtype=np.int64)
    for sample in samples:
        np.add.at(seen, sample.tokens[sample.graded], 1)
    order = np.argsort(-seen, kind="stable")[:count]
    return torch.from_numpy(np.sort(order))


def new_head(model: Any, config: HeadConfig, tokens: torch.Tensor, seed: int) -> EagleHead:
    """Create a float32 head for `model`, with the model's embeddings and random weights.

    The weights of its `lm_head` are those of the model's output embeddings for `tokens`, int64 `[U]`.
    """
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
