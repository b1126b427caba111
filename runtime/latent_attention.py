"""Latent attention (MLA) with the up-projections of keys and values absorbed into queries and outputs.

    q_h · (W_UK,h c_s) = (W_UK,hᵀ q_h) · c_s          scores from the cached latents themselves
    Σ_s a_s (W_UV,h c_s) = W_UV,h (Σ_s a_s c_s)       one up-projection of the sum

so that a step reads each latent once, for all heads, and expands none (DeepSeek-V2, https://arxiv.org/abs/2405.04434,
section 2.1). Both forms are the same sums in another order. Expanding S latents costs L (N + V) a slot and head, and
attention over latents 2 L + R - (N + R) - V more a query, slot and head: many queries at once are better expanded.

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
    """Whether `module` caches latents and expands them by `kv_b_proj` in a method `expand_kv`, as DeepSeek's does."""
    return hasattr(module, "expand_kv") and hasattr(module, "kv_b_proj") and all(hasattr(module, n) for n in _SIZES)


class Absorbed:
    """What an attention layer with latents is as well, once absorbed; outside the decode engine it is as before."""

    expand_kv: Any

    def absorbs(self: Any, tokens: int) -> bool:
        """Whether `tokens` queries are better run over latents."""
        latent, nope, value = self.kv_lora_rank, self.qk_nope_head_dim, self.v_head_dim
        return tokens * (2 * latent - nope - value) < latent * (nope + value)

    def absorb(self: Any, query: Tensor) -> Tensor:
        """Queries `[B, H, T, N + R]` for latents: `[B, H, T, L + R]`."""
        nope, rotated = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        of_keys = self._up_projections()[:, : self.qk_nope_head_dim]
        return torch.cat((torch.einsum("bhtn,hnl->bhtl", nope, of_keys), rotated), -1)

    def project(self: Any, out: Tensor) -> Tensor:
        """Values `[B, T, H, V]` of sums of latents `[B, T, H, L]`."""
        return torch.einsum("bthl,hvl->bthv", out, self._up_projections()[:, self.qk_nope_head_dim :])

    def _up_projections(self: Any) -> Tensor:
        """`[H, N + V, L]`, a view of the weight as it is."""
        weight = self.kv_b_proj.weight
        if is_traceable_wrapper_subclass(weight):
            raise ModelError(
                f"kv_b_proj of layer {self.layer_idx} holds a {type(weight).__name__}, and was absorbed as it was",
                hint="quantise the model first, and prepare it then",
            )
        return weight.view(self.num_heads, self.qk_nope_head_dim + self.v_head_dim, self.kv_lora_rank)


@functools.cache
def absorbed_class(cls: type) -> type:
    """`cls`, an attention layer's, with :class:`Absorbed`. Made once, so that copies of a model share it."""
    from effpass.runtime.attention import NAME

    def expand_kv(self: Any, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """In the engine the latents `[B, 1, S, L]` and `[B, 1, S, R]` as they are: attention does what is needed."""
        if self.config._attn_implementation == NAME:
            return kv_nope, k_rot
        return cls.expand_kv(self, kv_nope, k_rot)  # type: ignore[attr-defined]

    def expanded(self: Any, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        return cls.expand_kv(self, kv_nope, k_rot)  # type: ignore[attr-defined]

    members = {"expand_kv": expand_kv, "expanded": expanded, "__doc__": cls.__doc__, "__module__": cls.__module__}
    return type(cls.__name__, (Absorbed, cls), members)
