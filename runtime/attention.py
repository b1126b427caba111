"""Attention over the decode engine's cache, registered as an attention implementation of transformers.

:func:`reading_cache` selects the implementation for the duration of a generation. It is registered without a mask
builder, so that transformers builds no mask: a mask shared by all layers would be wrong as soon as layers hold
different positions, and a padding mask indexed by slot would be wrong as soon as keys are evicted. Visibility follows
from the positions stored in the cache instead (:mod:`effpass.runtime.cache`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

import effpass.lowering.ops.cached_attention  # noqa: F401  (registers effpass::cached_attention)
from effpass.core.alone import alone
from effpass.core.errors import ModelError
from effpass.runtime.cache import BufferedLayer, DecodeCache
from effpass.runtime.latent_attention import Absorbed

__all__ = ["NAME", "PREFILL", "cached_attention", "reading_cache"]

NAME = "effpass"
# SDPA backends for prefill, in order of preference. cuDNN's is the fastest for long prompts on Hopper, but is not
# PyTorch's first choice. For each new length it takes tens of milliseconds to plan, which short prompts do not make up
# for.
PREFILL = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_SHORT = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_LONG_FROM = 8192  # tokens
_UNKNOWN = ("position_bias", "s_aux")


def cached_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    effpass_cache: DecodeCache,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend to the cache; called by a model's attention layer with the result of :meth:`DecodeCache.update`.

    Args:
        module: the attention layer, whose `layer_idx` is the index of its cache layer.
        query: `[B, H, T, K]`, queries of the new tokens.
        key: `[B, G, S, K]`, keys of the cache slots to read.
        value: `[B, G, S, V]`, values of these slots.
        attention_mask: must be None, since visibility follows from positions.
        effpass_cache: the cache, which the model's forward receives as a keyword argument.
        scaling: factor on the scores; None for K^-½.
        softcap: soft cap on the scores; None if the model has none.

    Returns:
        The output `[B, T, H, V]`, and None in place of the attention weights that transformers allows for.

    Raises:
        ModelError: if the layer uses a feature that attention by positions does not support.
    """
    unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if attention_mask is not None or unknown:
        what = unknown[0] if unknown else "an attention mask of its own"
        raise ModelError(f"{type(module).__name__} passes {what} to attention, which the decode engine lacks")
    layer = effpass_cache.buffers(module.layer_idx)
    scale = scaling or query.shape[-1] ** -0.5
    has_latents = isinstance(module, Absorbed)
    reader, out = effpass_cache.reader, None
    if reader is not None and reader.keeps_queries and (query.shape[2] > 1 or layer.slots.in_prompt):
        last = query[:, :, -1:]
        reader.keep_query(module.layer_idx, module.absorb(last) if has_latents else last.clone())
    if has_latents:
        absorbs = module.absorbs(query.shape[2])
        if absorbs:
            whole = layer.joined(key, value, query.shape[2])
            query, key, value = module.absorb(query), whole, whole[..., : key.shape[-1]]
        else:
            key, value = module.expanded(key, value)
    if reader is not None:
        out = reader.attend(effpass_cache, module.layer_idx, query, key, value, scale, softcap or 0.0)
    if out is None:
        out = _attend(query, key, value, layer, effpass_cache, scale, softcap or 0.0)
    effpass_cache.attended(module.layer_idx, query, key, scale, softcap or 0.0)
    return module.project(out) if has_latents and absorbs else out, None


def _ordered(tokens: int) -> AbstractContextManager[None]:
    return sdpa_kernel(PREFILL if tokens >= _LONG_FROM else _SHORT, set_priority=True)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, layer: BufferedLayer, cache: DecodeCache, scale: float, softcap: float
) -> Tensor:
    slots = layer.slots
    rows, _, tokens, _ = query.shape
    reads, positions = key.shape[2], slots.positions
    sees_all = slots.is_dense and not slots.is_replayed and not 0 < layer.window < reads and not softcap
    if sees_all and tokens in (1, reads):
        is_causal = False
        if tokens > 1:  # a branch, so that a traced graph gets a guard: SDPA does not accept a symbolic bool
            is_causal = True
        with _ordered(tokens) if query.is_cuda else nullcontext():
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=is_causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
            )
        return out.transpose(1, 2).contiguous()
    if (rows, reads) != tuple(positions.shape):
        positions = positions[:rows, :reads]
    return torch.ops.effpass.cached_attention(
        query, key, value, positions, cache.query_positions, slots.filled, scale, layer.window, softcap
    )


@contextmanager
def reading_cache(model: Any) -> Iterator[None]:
    """Context manager in which `model` attends through :func:`cached_attention` and must be given `effpass_cache`.

    One thread at a time can be in it, per model.
    """
    with alone(model):
        AttentionInterface.register(NAME, cached_attention)
        # Only the language model has a cache; a vision tower keeps its attention implementation. All layers share this
        # config: `set_attn_implementation` would look through all modules to find that out, at every call.
        text = model.config.get_text_config(decoder=True)
        before = text._attn_implementation
        text._attn_implementation = NAME
        try:
            yield
        finally:
            text._attn_implementation = before
