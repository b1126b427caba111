"""`mla_absorption`: multi-head latent attention (MLA) that reads its cached latents without expanding them.

    q · (W_UK c) = (W_UKᵀ q) · c        Σ_s a_s (W_UV c_s) = W_UV (Σ_s a_s c_s)

q is the query of a head, c_s the cached latent of token s, a_s its attention weight, and W_UK and W_UV are the
up-projections to keys and values. For the attention of DeepSeek-V2 (https://arxiv.org/abs/2405.04434, section 2.1),
transformers caches the latents and expands all of them to the keys and values of every head at every step. With the
up-projections absorbed, a step projects its query and its output instead, and all heads share one key per token, whose
first part is the value. W_UK and W_UV are views of `kv_b_proj`, so that no weight is copied or becomes stale. A
quantized `kv_b_proj` is dequantized, because the absorbed form reads it along both dimensions, while its scales apply
to one of them. The pass acts in the decode engine; see :mod:`effpass.runtime.latent_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from effpass.core.errors import ModelError
from effpass.core.model import inner_model
from effpass.core.pass_ import RuntimePass
from effpass.core.report import Refusal
from effpass.passes.weights.quantized import plain_linear, scheme_of
from effpass.runtime.engine import check_decodable
from effpass.runtime.latent_attention import Absorbed, absorbed_class, is_latent_attention

__all__ = ["MLAAbsorption", "absorb", "latent_layers"]


class MLAAbsorption(RuntimePass):
    """Makes latent attention read its cached latents, unexpanded."""

    name = "mla_absorption"
    exact = True

    def check_model(self, model: nn.Module) -> None:
        layers = latent_layers(model)
        if not layers:
            raise ModelError(
                f"{type(model).__name__} has no latent attention (MLA): no layer caches latents and expands them by"
                " kv_b_proj",
                hint="leave mla_absorption out of the recipe for this model",
            )
        check_decodable(inner_model(model))

    def prepare(self, model: nn.Module) -> tuple[int, list[Refusal]]:
        """Make the layers with latent attention able to read latents directly; hits are layers."""
        return absorb(model), []


def latent_layers(model: Any) -> dict[str, Any]:
    """Return the layers with latent attention, by name.

    Raises:
        ModelError: the up-projections of one of them can't be absorbed.
    """
    layers = {name: module for name, module in inner_model(model).named_modules() if is_latent_attention(module)}
    for name, module in layers.items():
        up = module.kv_b_proj
        if (type(up) is not nn.Linear and scheme_of(up) is None) or up.bias is not None:
            raise ModelError(
                f"{name}.kv_b_proj is a {type(up).__name__}, and only a plain linear without bias can be absorbed",
                hint="merge adapters first (merge_lora before this pass)",
            )
        expected = (module.num_heads * (module.qk_nope_head_dim + module.v_head_dim), module.kv_lora_rank)
        if (up.out_features, up.in_features) != expected or not (scheme_of(up) or up.weight.is_contiguous()):
            raise ModelError(f"{name}.kv_b_proj.weight is {tuple(up.weight.shape)}, expected {expected}, contiguous")
        if isinstance(up.weight, torch.Tensor) and up.weight.is_meta:
            raise ModelError(f"{name}.kv_b_proj is not in memory (offloaded)", hint="load the model without offloading")
    return layers


def absorb(model: Any) -> int:
    """Absorb the up-projections of every layer with latent attention, and return the number of layers changed.

    Layers that are absorbed already are skipped.

    Raises:
        ModelError: the up-projections of a layer can't be absorbed; the model is unchanged.
    """
    layers = [module for module in latent_layers(model).values() if not isinstance(module, Absorbed)]
    dtype = inner_model(model).get_input_embeddings().weight.dtype
    plain = {m: plain_linear(m.kv_b_proj, dtype) for m in layers if scheme_of(m.kv_b_proj) is not None}
    for module in layers:
        module.kv_b_proj = plain.get(module, module.kv_b_proj)
        cls: type[Any] = type(module)
        module.__class__ = absorbed_class(cls)  # type: ignore[arg-type]
    return len(layers)
