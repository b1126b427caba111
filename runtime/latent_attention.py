"""Multi-head latent attention (MLA) with the up-projections of keys and values absorbed into queries and outputs.

Per token s, MLA caches a latent c_s and the rotated part of the key, instead of the keys and values of all heads. With
W_UK,h and W_UV,h the up-projections of head h to keys and values, q_h the part of its query without rotation, and a_s
the attention weights:

    q_h · (W_UK,h c_s) = (W_UK,hᵀ q_h) · c_s          scores directly from the cached latents
    Σ_s a_s (W_UV,h c_s) = W_UV,h (Σ_s a_s c_s)       one up-projection of the weighted sum

A decode step then reads each latent once for all heads, and expands none (DeepSeek-V2,
https://arxiv.org/abs/2405.04434, section 2.1). The two forms compute the same sums in a different order. Expanding
costs L (N + V) per slot and head, and attention over latents costs 2 L + R - (N + R) - V more per query, slot and head
than over expanded keys and values, so that expanding is cheaper for many queries.

Shapes: B batch, T tokens, H heads, L latent size, R rotated size, N size without rotation, V value size.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from effpass.core.errors import ModelError

__all__ = ["Absorbed", "absorbed_class", "is_latent_attention"]

_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_heads")


def is_latent_attention(module: Any) -> bool:
    """Whether `module` caches latents and expands them with `kv_b_proj` in a method `expand_kv`, as DeepSeek's does."""
    return hasattr(module, "expand_kv") and hasattr(module, "kv_b_proj") and all(hasattr(module, n) for n in _SIZES)


class Absorbed:
    """Mixin of a latent attention layer with absorbed up-projections; it has an effect in the decode engine only."""

    expand_kv: Any

    def absorbs(self: Any, tokens: int) -> bool:
        """Whether attention over latents is cheaper than expanding them for `tokens` queries."""
        latent, nope, value = self.kv_lora_rank, self.qk_nope_head_dim, self.v_head_dim
        return tokens * (2 * latent - nope - value) < latent * (nope + value)

    def absorb(self: Any, query: Tensor) -> Tensor:
        """Project queries `[B, H, T, N + R]` to queries over latents `[B, H, T, L + R]`."""
        nope, rotated = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        of_keys = self._up_projections()[:, : self.qk_nope_head_dim]
        return torch.cat((torch.einsum("bhtn,hnl->bhtl", nope, of_keys), rotated), -1)

    def project(self: Any, out: Tensor) -> Tensor:
        """Project weighted sums of latents `[B, T, H, L]` to outputs `[B, T, H, V]`."""
        return torch.einsum("bthl,hvl->bthv", out, self._up_projections()[:, self.qk_nope_head_dim :])

    def _up_projections(self: Any) -> Tensor:
        """Return the current weight of `kv_b_proj`, viewed as `[H, N + V, L]`."""
        weight = self.kv_b_proj.weight
        if is_traceable_wrapper_subclass(weight):
            raise ModelError(
                f"kv_b_proj of layer {self.layer_idx} holds a {type(weight).__name__}, and was absorbed as it was",
                hint="quantize the model first, and prepare it then",
            )
        return weight.view(self.num_heads, self.qk_nope_head_dim + self.v_head_dim, self.kv_lora_rank)


@functools.cache
def absorbed_class(cls: type) -> type:
    """Return a subclass of the attention class `cls` with :class:`Absorbed`; copies of a model share it."""
    from effpass.runtime.attention import NAME

    def expand_kv(self: Any, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """Return latents `[B, 1, S, L]` and `[B, 1, S, R]` unchanged in the engine, whose attention expands them."""
        if self.config._attn_implementation == NAME:
            return kv_nope, k_rot
        return cls.expand_kv(self, kv_nope, k_rot)  # type: ignore[attr-defined]

    def expanded(self: Any, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        return cls.expand_kv(self, kv_nope, k_rot)  # type: ignore[attr-defined]

    members = {"expand_kv": expand_kv, "expanded": expanded, "__doc__": cls.__doc__, "__module__": cls.__module__}
    return type(cls.__name__, (Absorbed, cls), members)
