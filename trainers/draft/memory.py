"""Estimate of the memory that the training of a draft head needs on one device."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from effpass.runtime.speculative.eagle_head import EagleHead, HeadConfig
from effpass.trainers.draft.unrolled import unroll
from effpass.trainers.lm.model import make_model
from effpass.trainers.lm.optimizers import STATE_BYTES
from effpass.trainers.memory import SHAPES, Estimate, available, kept_bytes

__all__ = ["estimate"]

_FLOAT = 4


def estimate(
    model_config: Any,
    head_config: HeadConfig,
    optimizer: str,
    *,
    rows: int,
    length: int,
    steps: int,
    bfloat16: bool,
    device: torch.device,
) -> Estimate:
    """Estimate the memory of the head, its activations for the backward pass, and the model.

    Args:
        model_config: config of the model.
        head_config: sizes of the head.
        optimizer: name of the optimizer.
        rows, length: number of rows of a micro-batch, and of tokens per row.
        steps: number of steps for which the head is unrolled.
        bfloat16: whether computation and the model's weights are bfloat16.
        device: device to train on.
    """
    element = 2 if bfloat16 else _FLOAT
    with torch.device("meta"), no_init_weights():
        target = make_model(copy.deepcopy(model_config), None, 0)
        target.tie_weights()  # type: ignore[operator]
        frozen = sum(p.numel() for p in target.parameters())
    activations = None
    vocabulary = head_config.layer.vocab_size
    with FakeTensorMode(), SHAPES:
        head = EagleHead(head_config)
        head.embed_tokens = nn.Embedding(vocabulary, head_config.layer.hidden_size).requires_grad_(False)
        learned = sum(p.numel() for p in head.parameters() if p.requires_grad)
        ids = torch.zeros(rows, length, dtype=torch.long)
        places = torch.arange(length).expand(rows, -1)
        tapped = torch.zeros(rows, length, len(head_config.taps) * head_config.layer.hidden_size)

        def forward(_: Any) -> tuple[Tensor, Tensor]:
            return torch.cat(unroll(head, ids, places, tapped, steps)), ids.repeat(steps, 1)

        with suppress(RuntimeError, NotImplementedError):
            activations = kept_bytes(head, forward, bfloat16=bfloat16)
            # The model's logits, and its distribution over the head's vocabulary.
            activations += rows * length * (vocabulary * element + head_config.draft_vocabulary * 2 * _FLOAT)
    state = learned * (2 * _FLOAT + STATE_BYTES[optimizer]) + frozen * element + (2 * learned if bfloat16 else 0)
    return Estimate(frozen + learned, state, activations, "", available(device))
