"""How pictures enter a model: their size, the tokens that stand for one, normalisation, and the processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effpass.core.errors import EffpassError, ModelError
from effpass.trainers.lm.config import Config
from effpass.trainers.lm.model import make_model, reads_pictures
from effpass.trainers.lm.pictures import MIN_SIZE, ROOM

__all__ = ["PictureInput", "check_pictures", "make_processor", "model_inputs", "picture_input"]

# Pixels from 0 to 255 become numbers from -1 to 1, as SigLIP has them.
_MEAN = _STD = 0.5


@dataclass(frozen=True)
class PictureInput:
    """What a vision-language model makes of a picture.

    Attributes:
        size: pixels of a side.
        patch: pixels of a patch's side.
        tokens: that stand for one picture in `input_ids`.
        token: that token's id.
    """

    size: int
    patch: int
    tokens: int
    token: int


def picture_input(architecture: Any) -> PictureInput | None:
    """The same of a transformers config; None where the model reads text alone.

    Raises:
        ModelError: the model takes more or fewer tokens for a picture than its config says.
    """
    if not reads_pictures(architecture):
        return None
    size, patch = architecture.vision_config.image_size, architecture.vision_config.patch_size
    with torch.device("meta"), torch.no_grad():
        model: Any = make_model(architecture, None, 0)
        (features,) = model.get_image_features(torch.empty(1, 3, size, size)).pooler_output
    tokens = features.shape[0]
    if tokens != architecture.image_seq_length:
        raise ModelError(
            f"model.image_seq_length: got {architecture.image_seq_length}, and the model makes {tokens} tokens of a"
            f" picture of {size} x {size} pixels",
            hint="vision_feature_select_strategy: full for a vision tower without class token, default for one with it",
        )
    return PictureInput(size, patch, tokens, architecture.image_token_id)


def check_pictures(config: Config, pictures: PictureInput | None) -> None:
    """Raise an :class:`EffpassError` where a source of pictures can't be used with this model or these stages."""
    for number, source in enumerate(config.data):
        if source.pictures is None:
            continue
        place = f"data[{number}]: pictures of {source.pictures}"
        if pictures is None:
            kind = config.model.get("model_type", config.model.get("from"))
            raise EffpassError(
                f"{place} need a model that reads pictures, and {kind} reads text alone",
                hint="model_type: llava with a vision_config and a text_config, or remove the source",
            )
        if pictures.size < MIN_SIZE:
            raise EffpassError(
                f"{place} need {MIN_SIZE} x {MIN_SIZE} pixels, and model.vision_config.image_size is {pictures.size}"
            )
        shortest = min(stage.sequence_length for stage in config.stages)
        if shortest < pictures.tokens + ROOM:
            raise EffpassError(
                f"{place} need {pictures.tokens + ROOM} tokens ({pictures.tokens} for the picture, {ROOM} for text),"
                f" and a stage has sequences of {shortest}"
            )
        if config.fsdp:
            raise EffpassError(
                f"{place}: a sharded model needs a picture in every process at every step, which is left to chance",
                hint="fsdp: false",
            )


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A micro-batch as arguments of the model: `input_ids`, and float32 `pixel_values` `[N, 3, H, W]` where it has any.

    Args:
        batch: `input_ids`, and perhaps `pixels` uint8 `[N, H, W, 3]`, which take a quarter of the way to the device.
    """
    inputs = {"input_ids": batch["input_ids"]}
    if "pixels" in batch:
        inputs["pixel_values"] = (batch["pixels"].permute(0, 3, 1, 2).float() / 255 - _MEAN) / _STD
    return inputs


def make_processor(pictures: PictureInput, architecture: Any, tokenizer: Any) -> Any:
    """The stock processor that gives what training saw: ``processor(images=..., text="<image>...")``."""
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    sides = {"height": pictures.size, "width": pictures.size}
    strategy = architecture.vision_feature_select_strategy
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil(
            size=sides, do_center_crop=False, image_mean=[_MEAN] * 3, image_std=[_STD] * 3
        ),
        tokenizer=tokenizer,
        patch_size=pictures.patch,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=pictures.tokens - (pictures.size // pictures.patch) ** 2 + (strategy == "default"),
    )
