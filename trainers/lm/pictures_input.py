"""Input of pictures to a vision-language model: size, placeholder tokens, normalization, and the saved processor."""

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

# Pixel values from 0 to 255 are normalized to values from -1 to 1, as in SigLIP.
_MEAN = _STD = 0.5


@dataclass(frozen=True)
class PictureInput:
    """Input format of pictures.

    Attributes:
        size: side length of a picture in pixels.
        patch: side length of a patch in pixels.
        tokens: number of placeholder tokens per picture in `input_ids`.
        token: id of the placeholder token.
    """

    size: int
    patch: int
    tokens: int
    token: int


def picture_input(architecture: Any) -> PictureInput | None:
    """Return the input format of pictures for a transformers config; None if the model reads text only.

    Raises:
        ModelError: if the number of tokens that the model makes of a picture is not the one in its config.
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
    """Raise an :class:`EffpassError` if a source of pictures can't be used with this model or these stages."""
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
    """Return the arguments of the model for a micro-batch.

    Args:
        batch: `input_ids` and optionally `pixels`, uint8 `[N, H, W, 3]`. Pixels are copied to the device in this form,
            which has a quarter of the size.

    Returns:
        `input_ids` and, if there are pictures, `pixel_values`, float32 `[N, 3, H, W]`.
    """
    inputs = {"input_ids": batch["input_ids"]}
    if "pixels" in batch:
        inputs["pixel_values"] = (batch["pixels"].permute(0, 3, 1, 2).float() / 255 - _MEAN) / _STD
    return inputs


def make_processor(pictures: PictureInput, architecture: Any, tokenizer: Any) -> Any:
    """Return the transformers processor that prepares inputs as in training.

    It is called as ``processor(images=..., text="<image>...")``.
    """
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
