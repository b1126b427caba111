"""EAGLE-3's head: a decoder layer that goes on where the target's features end (https://arxiv.org/abs/2503.01840).

    h_t = fc([x_t^a; x_t^b; x_t^c])               inputs of three of the target's layers at token t
    g_t = layer([n_e(e_{t+1}); n_h(h_t)])         with the embedding of the token that follows
    q_{t+2} = softmax(lm_head(norm(g_t)))         over the draft's vocabulary

Where the target has not been yet, g of the node above stands in for h. The module's tensors are named, and computed
with, as in the `speculators` format (https://github.com/vllm-project/speculators), and so the format's other flags are
here: of norms before `fc`, before the residual, and of what is handed on.

Shapes: B rows, T tokens, D width, V the target's vocabulary, U the draft's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

__all__ = ["EagleHead", "HeadConfig", "HeadOutput"]


class HeadOutput(NamedTuple):
    """`logits` `[B, T, U]`, and `hidden` `[B, T, D]`: g, to go on with."""

    logits: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class HeadConfig:
    """
    Attributes:
        layer: a LlamaConfig of the head's layers; `vocab_size` is V, `hidden_size` D.
        draft_vocabulary: U.
        taps: layers of the target whose inputs are the features; the number of its layers stands for the last output.
        norm_before_residual: the layer adds to n_h(h), and not to h.
        norm_before_fc: features are normed first.
        norm_output: what is handed on is normed.
    """

    layer: Any
    draft_vocabulary: int
    taps: tuple[int, ...]
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False


class Norm(nn.Module):
    """RMSNorm as one operator."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class _FirstLayer(LlamaDecoderLayer):
    """Takes an embedding beside the hidden states, side by side `[B, T, 2 D]`."""

    def __init__(self, config: Any, norm_before_residual: bool) -> None:
        super().__init__(config, 0)
        self.norm_before_residual = norm_before_residual
        self.hidden_norm = Norm(config.hidden_size, config.rms_norm_eps)
        attention = self.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            old = getattr(attention, name)
            setattr(attention, name, nn.Linear(2 * config.hidden_size, old.out_features, bias=old.bias is not None))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        embedding, hidden = hidden_states.chunk(2, -1)
        normed = self.hidden_norm(hidden)
        both = torch.cat((self.input_layernorm(embedding), normed), -1)
        attended, _ = self.self_attn(hidden_states=both, **kwargs)
        hidden = (normed if self.norm_before_residual else hidden) + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class EagleHead(nn.Module):
    """The head. `embed_tokens` is the target's, and is given to it by :meth:`share`.

    Args:
        config: its shape.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        layer = copy.deepcopy(config.layer)
        size, eps = layer.hidden_size, layer.rms_norm_eps
        self.config, self.head_config = layer, config
        self.embed_tokens = nn.Embedding(layer.vocab_size, size, device="meta")
        self.fc = nn.Linear(len(config.taps) * size, size, bias=False)
        self.input_norm = Norm(len(config.taps) * size, eps) if config.norm_before_fc else None
        layers: list[nn.Module] = [_FirstLayer(layer, config.norm_before_residual)]
        layers += [LlamaDecoderLayer(layer, index) for index in range(1, layer.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        for module in self.layers:
            for name in ("input_layernorm", "post_attention_layernorm"):
                setattr(module, name, Norm(size, eps))
        self.norm = Norm(size, eps)
        self.lm_head = nn.Linear(size, config.draft_vocabulary, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(layer)
        self.d2t: Tensor | None
        self.t2d: Tensor | None
        renames = config.draft_vocabulary < layer.vocab_size
        places = torch.zeros(config.draft_vocabulary, dtype=torch.long) if renames else None
        self.register_buffer("d2t", places)  # what to add to a draft's token for the target's
        self.register_buffer("t2d", torch.zeros(layer.vocab_size, dtype=torch.bool) if renames else None)

    def share(self, target: Any) -> None:
        """Read the embeddings of `target`, which stay its own."""
        self.embed_tokens.weight = target.get_input_embeddings().weight

    def choose_tokens(self, tokens: Tensor) -> None:
        """Let the draft's vocabulary be `tokens`, int64 `[U]`, ascending."""
        assert self.d2t is not None
        assert self.t2d is not None
        self.d2t.copy_(tokens - torch.arange(len(tokens), device=tokens.device))
        self.t2d.zero_()
        self.t2d[tokens] = True

    def features(self, tapped: Tensor) -> Tensor:
        """h `[..., D]` of the target's features `[..., taps D]`."""
        return self.fc(tapped if self.input_norm is None else self.input_norm(tapped))

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, logits_to_keep: int = 0, **kwargs: Any
    ) -> HeadOutput:
        """
        Args:
            input_ids: int64 `[B, T]`: tokens t + 1.
            position_ids: `[B, T]`: where they stand.
            features: `[B, T, D]`: h of tokens t, or g of nodes.
            logits_to_keep: of how many of the last tokens; 0 for all.
            kwargs: the cache, and what attention reads.
        """
        embedded = self.embed_tokens(input_ids).to(features.dtype)
        hidden = torch.cat((embedded, features), -1)
        angles = self.rotary_emb(features, position_ids)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=angles, position_ids=position_ids, **kwargs)
        normed = self.norm(hidden)
        logits = self.lm_head(normed[:, -logits_to_keep:] if logits_to_keep else normed)
        return HeadOutput(logits, normed if self.head_config.norm_output else hidden)

    # -- what the decode engine asks of a model ----------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.fc.weight.device

    def _supports_logits_to_keep(self) -> bool:
        return True

    def _can_set_experts_implementation(self) -> bool:
        return False

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name
