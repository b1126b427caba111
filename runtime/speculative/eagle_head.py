"""The EAGLE-3 head (https://arxiv.org/abs/2503.01840), a decoder layer that predicts tokens from the target's features.

    h_t = fc([x_t^a; x_t^b; x_t^c])               x: features, inputs of three of the target's layers at token t
    g_t = layer([n_e(e_{t+1}); n_h(h_t)])         e: embedding of the token that follows;  n: RMSNorm
    q_{t+2} = softmax(lm_head(norm(g_t)))         probabilities over the draft's vocabulary

For tokens that the target has not run yet, g of the parent node replaces h. Names and use of the tensors are those of
the `speculators` format (https://github.com/vllm-project/speculators), including its flags for a norm before `fc`, a
norm before the residual, and normalized hidden states as output.

Shapes: B batch, T tokens, D hidden size, V vocabulary of the target, U vocabulary of the draft.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import effpass.lowering.ops.ring_buffer  # noqa: F401  (registers the operators)

__all__ = ["EagleHead", "HeadConfig", "HeadOutput"]


class HeadOutput(NamedTuple):
    """Output of the head.

    Attributes:
        logits: `[B, T, U]`, logits over the draft's vocabulary; of fewer tokens if they were limited.
        hidden: `[B, T, D]`, hidden states g, the input for the children of the nodes; `[B, 1, D]` with `taken`.
    """

    logits: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class HeadConfig:
    """Sizes and flags of a head.

    Attributes:
        layer: `LlamaConfig` of the head's layers, with `vocab_size` V and `hidden_size` D.
        draft_vocabulary: size U of the draft's vocabulary.
        taps: indices of the target's layers whose inputs are the features.
        norm_before_residual: whether the first layer adds its attention to n_h(h), instead of h.
        norm_before_fc: whether features are normalized before `fc`.
        norm_output: whether the hidden states that are returned are normalized.
    """

    layer: Any
    draft_vocabulary: int
    taps: tuple[int, ...]
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False


class Norm(nn.Module):
    """RMSNorm as one `torch.nn.functional.rms_norm` operator."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class _FirstLayer(LlamaDecoderLayer):
    """First layer of the head, whose inputs are embeddings `[B, T, D]` and hidden states `[B, T, D]`."""

    def __init__(self, config: Any, norm_before_residual: bool) -> None:
        super().__init__(config, 0)
        self.norm_before_residual = norm_before_residual
        self.hidden_norm = Norm(config.hidden_size, config.rms_norm_eps)
        attention = self.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            old = getattr(attention, name)
            setattr(attention, name, nn.Linear(2 * config.hidden_size, old.out_features, bias=old.bias is not None))

    def forward(self, embedded: Tensor, hidden: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        normed = self.hidden_norm(hidden)
        both = torch.cat((self.input_layernorm(embedded), normed), -1)
        attended, _ = self.self_attn(hidden_states=both, **kwargs)
        hidden = (normed if self.norm_before_residual else hidden) + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class EagleHead(nn.Module):
    """The EAGLE-3 head as a module that the decode engine can run.

    Its `embed_tokens` has no storage until :meth:`share` sets its weight to the target's embeddings.

    Args:
        config: sizes and flags of the head.

    Attributes:
        d2t: int64 `[U]`, offset from each token of the draft's vocabulary to the target's; None if they are the same.
        t2d: bool `[V]`, tokens of the target that the draft's vocabulary has; None if they are the same.
        verifier: folder or hub id of the model that the head was trained for; None if that is not known.
    """

    verifier: str | None = None

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
        self.register_buffer("d2t", places)
        self.register_buffer("t2d", torch.zeros(layer.vocab_size, dtype=torch.bool) if renames else None)

    def share(self, target: Any) -> None:
        """Use the embeddings of `target`, without a copy."""
        self.embed_tokens.weight = target.get_input_embeddings().weight

    def choose_tokens(self, tokens: Tensor) -> None:
        """Set the draft's vocabulary to `tokens` of the target, int64 `[U]`, ascending."""
        assert self.d2t is not None
        assert self.t2d is not None
        self.d2t.copy_(tokens - torch.arange(len(tokens), device=tokens.device))
        self.t2d.zero_()
        self.t2d[tokens] = True

    def features(self, tapped: Tensor) -> Tensor:
        """Compute h `[..., D]` from the target's features `[..., len(taps) · D]`."""
        return self.fc(tapped if self.input_norm is None else self.input_norm(tapped))

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, logits_to_keep: int | Tensor = 0,
        taken: Tensor | None = None, **kwargs: Any,
    ) -> HeadOutput:  # fmt: skip
        """Run the head.

        Args:
            input_ids: int64 `[B, T]`, tokens t + 1.
            position_ids: `[B, T]`, their positions.
            features: `[B, T, D]`, h of the tokens t, or g of the parent nodes.
            logits_to_keep: number of last tokens to compute logits for, 0 for all; or int64 `[L]`, indices of tokens.
            taken: int64 `[B]`, number of leading tokens of each sequence that are not padding, the last of which is the
                only one to compute logits and hidden states for; None for all tokens.
            kwargs: the cache and other inputs of attention.
        """
        embedded = self.embed_tokens(input_ids).to(features.dtype)
        kwargs |= {"position_embeddings": self.rotary_emb(features, position_ids), "position_ids": position_ids}
        first, *others = self.layers
        hidden = first(embedded, features, **kwargs)
        for layer in others:
            hidden = layer(hidden, **kwargs)
        if taken is not None:
            hidden = torch.ops.effpass.read_ring(hidden, taken, -1, 1)
        normed = self.norm(hidden)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(normed[:, kept])
        return HeadOutput(logits, normed if self.head_config.norm_output else hidden)

    # -- interface that the decode engine requires --------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.fc.weight.device

    def _supports_logits_to_keep(self) -> bool:
        return True

    def _can_set_experts_implementation(self) -> bool:
        return False

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name
