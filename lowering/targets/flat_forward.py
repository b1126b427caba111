"""A model's `forward` while it is captured: the inputs and outputs of a decode graph, and code that can be exported."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from effpass.core.cache_name import cache_name
from effpass.core.errors import ExportError
from effpass.core.model import inner_model
from effpass.lowering.targets.cache_layers import CacheLayer, state_classes
from effpass.lowering.targets.tracing import relate_sizes

__all__ = ["flat_forward"]

_ATTENTION = "effpass_decode_graph"
_STOCK_ATTENTION = ("sdpa", "eager", "flash_attention", "flex_attention")


@contextmanager
def flat_forward(model: Any, layers: Sequence[CacheLayer]) -> Iterator[list[str]]:
    """Context manager in which ``model(...)`` has the inputs and outputs of a decode graph, in its order
    (:mod:`effpass.lowering.targets.decode_graph`).

    Yields the names of the inputs. The instance's `forward` is replaced instead of wrapped in another module, so that
    weights keep their names in the captured graph.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class GivenLayer(DynamicLayer):
        """A cache layer that is created with keys and values, and does not branch on whether they are empty."""

        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__()
            self.keys, self.values, self.is_initialized = keys, values, True
            self.dtype, self.device = keys.dtype, keys.device

        def get_seq_length(self) -> int:
            assert self.keys is not None
            return self.keys.shape[-2]

    inner, states = model.forward, state_classes(model)

    def given_state(index: int, conv: Tensor, state: Tensor, seen: Any) -> Any:
        layer = states[index]()
        layer.conv, layer.state, layer.seen, layer.is_initialized = conv, state, seen, True
        return layer

    name_of_cache = cache_name()

    def forward(input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        relate_sizes(layers, input_ids, attention_mask, position_ids, *past)
        cache: Any = DynamicCache()
        seen = attention_mask.shape[1] - input_ids.shape[1]
        cache.layers = [
            GivenLayer(*past[2 * i : 2 * i + 2]) if layer.grows else given_state(i, past[2 * i], past[2 * i + 1], seen)
            for i, layer in enumerate(layers)
        ]
        out = inner(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{name_of_cache: cache},
        )
        kept = ((y.conv, y.state) if hasattr(y, "conv") else (y.keys, y.values) for y in cache.layers)
        return (out.logits, *(tensor for pair in kept for tensor in pair))

    names = ["input_ids", "attention_mask", "position_ids"]
    names += [f"past_key_values_{i}_{part}" for i, layer in enumerate(layers) for part in layer.parts]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # type: ignore[attr-defined]
    with ExitStack() as stack:
        stack.enter_context(_exportable_implementations(model))
        stack.enter_context(_attribute(model, "forward", forward))
        for module in model.modules():
            if hasattr(type(module), "expand_kv") and "expand_kv" not in vars(module):
                stack.enter_context(_attribute(module, "expand_kv", functools.partial(_expand_kv, module)))
        yield names


@contextmanager
def _attribute(module: Any, name: str, value: Any) -> Iterator[None]:
    """Context manager in which an instance attribute is set; on exit the instance's own value is restored."""
    held = {name: vars(module)[name]} if name in vars(module) else {}
    setattr(module, name, value)
    try:
        yield
    finally:
        delattr(module, name)
        vars(module).update(held)


@contextmanager
def _exportable_implementations(model: Any) -> Iterator[None]:
    """Context manager that selects implementations of attention and experts without branches on sizes or values.

    An attention implementation of effpass's own is left in place.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    base = inner_model(model)
    config = base.config
    attention, experts = config._attn_implementation, getattr(config, "_experts_implementation", None)
    if base._supports_sdpa and attention.startswith(_STOCK_ATTENTION):
        base.set_attn_implementation(_ATTENTION)
    loops = experts == "eager" and base._can_set_experts_implementation()  # over the chosen experts
    if loops:
        base.set_experts_implementation("grouped_mm")
    try:
        yield
    finally:
        if base.config._attn_implementation != attention:
            base.set_attn_implementation(attention)
        if loops:
            base.set_experts_implementation(experts)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention like transformers' `sdpa`, but without its branches on T.

    query is `[B, H, T, K]`, key and value are `[B, G, S, ...]`. Grouped-query attention is left to the operator
    (`enable_gqa`), so that no target has to copy keys and values H / G times.
    """
    unknown = [k for k in ("position_bias", "s_aux", "softcap") if kwargs.get(k) is not None]
    if unknown:
        raise ExportError(f"{type(module).__name__} passes {unknown[0]} to attention, which the decode graph lacks")
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


def _expand_kv(module: Any, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """Expand the latents of multi-head latent attention into keys and values, without in-place operations.

    It replaces the model's own method, which writes into an empty tensor in place.

    Args:
        latent: `[B, 1, S, latent]`, the latents without position information.
        rotary: `[B, 1, S, rotary]`, the rotated part of the keys, shared by all heads.
    """
    nope, size = module.qk_nope_head_dim, module.v_head_dim
    heads = module.kv_b_proj(latent).unflatten(-1, (-1, nope + size)).squeeze(1).transpose(1, 2)
    keys, values = heads.split([nope, size], dim=-1)
    return torch.cat([keys, rotary.expand(-1, keys.shape[1], -1, -1)], dim=-1), values
