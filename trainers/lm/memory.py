"""Estimate of the device memory that a pretraining run needs; checked before the run starts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from effpass.trainers.lm.batches import most_pictures
from effpass.trainers.lm.config import Config
from effpass.trainers.lm.model import make_model, set_experts
from effpass.trainers.lm.optimizers import STATE_BYTES
from effpass.trainers.lm.pictures_input import PictureInput, model_inputs
from effpass.trainers.memory import SHAPES, Estimate, available, kept_bytes, use_causal_attention

__all__ = ["estimate"]

_FLOAT = 4


def estimate(
    config: Config, model_config: object, device: torch.device, world: int, pictures: PictureInput | None = None
) -> Estimate:
    """Estimate the memory of a run on one of `world` devices.

    Args:
        config: config of the run.
        model_config: transformers config of the model.
        device: device of this process.
        world: number of devices.
        pictures: how the model reads pictures; None if it does not.
    """
    shards = world if config.fsdp else 1
    activations, stage = None, 0
    with FakeTensorMode(), SHAPES:
        with no_init_weights():  # initializing a vision tower depends on drawn values, which fake tensors don't have
            model: Any = make_model(model_config, None, 0)
        model.tie_weights()
        parameters = sum(p.numel() for p in model.parameters())
        use_causal_attention(model, text_only=pictures is not None)
        set_experts(model)
        with suppress(RuntimeError, NotImplementedError):  # raised by operators with data-dependent shapes
            activations, stage = max((_kept(config, model, i, world, pictures), i) for i in range(len(config.stages)))
    state = parameters * (2 * _FLOAT + STATE_BYTES[config.optimizer.name]) // shards
    if config.dtype == "bfloat16":
        state += 2 * parameters  # copy of the weights that autocast makes
    return Estimate(parameters, state, activations, f"stages[{stage}]", available(device))


def _kept(config: Config, model: Any, index: int, world: int, pictures: PictureInput | None) -> int:
    """Count the bytes that autograd saves in a stage, and those of the gradients that start the backward pass."""
    stage = config.stages[index]
    rows = max(1, stage.batch // (stage.accumulate * world))
    ids = torch.zeros(rows, stage.sequence_length, dtype=torch.long)

    def forward(keep: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        inputs = {"input_ids": ids}
        count = most_pictures(config, index, world, pictures)
        if pictures is not None and count:
            pixels = keep(torch.zeros(count, pictures.size, pictures.size, 3, dtype=torch.uint8))
            inputs = _with_pictures(model, {"input_ids": ids, "pixels": pixels}, keep)
        return model(**inputs, use_cache=False).logits, ids

    return kept_bytes(model, forward, bfloat16=config.dtype == "bfloat16")


def _with_pictures(model: Any, batch: dict[str, Tensor], keep: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Compute the inputs of LLaVA's language model as its forward does.

    The check of the token values is left out, since fake tensors have none.
    """
    inputs = model_inputs(batch)
    features = torch.cat(model.get_image_features(keep(inputs["pixel_values"])).pooler_output)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    is_picture = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)[..., None]
    return {"inputs_embeds": embeddings.masked_scatter(is_picture, features.to(embeddings.dtype))}
