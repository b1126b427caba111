"""Decode steps of a tiny model with the decode engine's cache, as its CUDA graph runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from effpass.runtime.attention import reading_cache
from effpass.runtime.cache import DecodeCache

__all__ = ["decode", "enliven"]


def enliven(model: Any, seed: int = 0) -> Any:
    """Redraw all parameters, so that each norm's weight and each bias matters and logits are not nearly equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
            parameter.copy_(drawn * scale + (0.3 if parameter.dim() == 1 else 0.0))
    return model


def decode(model: Any, run: Callable[..., Any], rows: int, prompt: int = 5, tokens: int = 1, steps: int = 2) -> Any:
    """Logits `[steps, rows, tokens, vocab]` of steps that `run`, the model or what it was compiled to, makes.

    The first of several rows has two positions of left padding in its prompt.
    """
    generator = torch.Generator().manual_seed(rows)
    cache = DecodeCache(model.config, rows, prompt + steps * tokens + 3, torch.device("cpu"))
    position = torch.arange(prompt, dtype=torch.int32).repeat(rows, 1)
    if rows > 1:
        position[0] -= 2
    logits = []
    with torch.no_grad(), reading_cache(model):
        for step in range(steps + 1):
            cache.append(position.clamp(min=-1))
            cache.advance(position.shape[1])
            for slots in cache.distinct_slots():
                slots.is_dense = rows == 1
                slots.is_replayed = step > 0
            output = (run if step else model)(
                input_ids=torch.randint(3, 96, position.shape, generator=generator),
                position_ids=position.clamp(min=0).long(),
                past_key_values=cache,
                effpass_cache=cache,
                use_cache=True,
            )
            logits.append(output.logits)
            position = position[:, -1:] + torch.arange(1, tokens + 1, dtype=torch.int32)
    return torch.stack(logits[1:])
