"""Preparation of prompts: turns the text of a user, and images for a vision-language model, into inputs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effpass.core.errors import EffpassError

__all__ = ["open_image", "prompt_inputs"]


def open_image(path: str | Path) -> Any:
    """Open an image file as a PIL `Image` in RGB.

    Raises:
        EffpassError: the file does not exist or is not an image, or Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise EffpassError("images need the package pillow", hint="pip install pillow") from error
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:  # PIL's error for files that are not images is a subclass
        raise EffpassError(f"{path}: no image that can be read: {error}") from error


def prompt_inputs(tokenizer: Any, text: str, images: Sequence[Any] = (), processor: Any = None) -> Any:
    """Tokenize a prompt: `input_ids` `[1, T]`, `attention_mask` and, with images, `pixel_values`.

    Args:
        tokenizer: tokenizer of the model. Its chat template, if it has one, is applied.
        text: text of the user.
        images: PIL images; they precede the text.
        processor: processor of the model; required for images.

    Returns:
        The inputs by name, as the tokenizer or processor returns them.

    Raises:
        EffpassError: the prompt has no tokens, the text contains the image token, or the processor does not define
            where images go.
    """
    template = {"add_generation_prompt": True, "tokenize": True, "return_tensors": "pt", "return_dict": True}
    if images:
        inputs = _with_images(processor, text, images, template)
    elif getattr(tokenizer, "chat_template", None):
        inputs = tokenizer.apply_chat_template([{"role": "user", "content": text}], **template)
    else:
        inputs = tokenizer(text, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise EffpassError("the prompt is empty", hint="give at least one token of text")
    return inputs


def _with_images(processor: Any, text: str, images: Sequence[Any], template: dict[str, Any]) -> Any:
    if processor is None:
        raise EffpassError("images need the model's processor", hint="load_model(source, images=True)")
    token = getattr(processor, "image_token", None)
    if token is not None and token in text:
        raise EffpassError(
            f"the text has {token} in it, and images stand before the text without being named",
            hint=f"leave {token} out",
        )
    if getattr(processor, "chat_template", None):
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        return processor.apply_chat_template([{"role": "user", "content": content}], **template)
    if token is None:
        raise EffpassError(
            f"{type(processor).__name__} has neither a chat template nor an image token: where images go is unknown",
            hint="save the processor with its chat template",
        )
    return processor(text=f"{token * len(images)}{text}", images=list(images), return_tensors="pt")
