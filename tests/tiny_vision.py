"""A tiny LLaVA with a processor as a checkpoint folder, and an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_checkpoint import make_checkpoint

__all__ = ["make_image", "make_llava", "make_vision_checkpoint"]

IMAGE_TOKEN = "<image>"
PATCHES = 16


def make_llava(vocabulary: int = 258, image_token: int = 257) -> Any:
    """2 layers of vision, 2 of language, images of 28 x 28 in 16 patches."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_token, vision_feature_layer=-1)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def make_vision_checkpoint(folder: Path) -> Path:
    """Save the model with a byte-level tokenizer, an image processor and no chat template."""
    from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor

    tokenizer = AutoTokenizer.from_pretrained(make_checkpoint(folder / "text"))
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=7, vision_feature_select_strategy="default", image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )  # fmt: skip
    model = make_llava(len(tokenizer), tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    model.save_pretrained(folder / "vision")
    processor.save_pretrained(folder / "vision")
    return folder / "vision"


def make_image(path: Path, seed: int = 0) -> Path:
    """A picture of noise."""
    import numpy as np
    from PIL import Image

    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(path)
    return path
