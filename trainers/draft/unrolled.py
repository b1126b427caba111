"""A head run as it will be used, at every token of a text at once (training-time test, arXiv 2503.01840, section 3).

At step s the head proposes, from the features of tokens up to t, the token t + 2 + s. It attends to the features of
tokens up to t (step 0), and to its own states of the steps since, which belong to t alone:

    step s at t sees   step 0 at t' ≤ t   and   steps 1 ... s at t

Tokens are the text's, as for a draft whose proposals were right so far. Texts that share a row do not see each other.

Shapes: B rows, T tokens, D width, H heads, G key-value heads, K key size, U the draft's vocabulary, S steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from effpass.core.cache_name import cache_name
from effpass.runtime.speculative.eagle_head import EagleHead

__all__ = ["owners", "reaches", "unroll"]

_NAME = "effpass_unrolled"


@dataclass
class _Steps:
    """Keys `[B, G, T, K]` and values of every layer and step so far; stands in for a cache."""

    sees: Tensor
    keys: dict[int, list[Tensor]] = field(default_factory=dict)
    values: dict[int, list[Tensor]] = field(default_factory=dict)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.setdefault(layer, []).append(keys)
        self.values.setdefault(layer, []).append(values)
        return keys, values


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, steps: _Steps, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention of one step over step 0 and over what the same token said since."""
    keys, values = steps.keys[module.layer_idx], steps.values[module.layer_idx]
    batch, heads, tokens, size = query.shape
    grouped = query.view(batch, keys[0].shape[1], -1, tokens, size) * scaling
    causal = (grouped @ keys[0].unsqueeze(2).mT).masked_fill(~steps.sees[:, None, None], float("-inf"))
    own = [(grouped * k.unsqueeze(2)).sum(-1, keepdim=True) for k in keys[1:]]
    weights = torch.cat((causal, *own), -1).softmax(-1, dtype=torch.float32).to(value.dtype)
    out = weights[..., :tokens] @ values[0].unsqueeze(2)
    for step, v in enumerate(values[1:]):
        out = out + weights[..., tokens + step, None] * v.unsqueeze(2)
    return out.reshape(batch, heads, tokens, -1).transpose(1, 2), None


def owners(position_ids: Tensor) -> Tensor:
    """Which text of its row a token belongs to, int64 `[B, T]`; positions start at 0 in each."""
    return (position_ids == 0).long().cumsum(1)


def reaches(position_ids: Tensor, steps: int) -> Tensor:
    """bool `[B, T]`: whether token t + 1 + `steps` is of the same text as token t."""
    owner = owners(position_ids)
    return torch.nn.functional.pad(owner[:, 1 + steps :], (0, 1 + steps)) == owner


def unroll(head: EagleHead, input_ids: Tensor, position_ids: Tensor, tapped: Tensor, steps: int) -> list[Tensor]:
    """Logits of every step.

    Args:
        head: its attention implementation is this module's while it runs.
        input_ids: int64 `[B, T]`.
        position_ids: int64 `[B, T]`.
        tapped: `[B, T, taps D]`: the target's features.
        steps: S.

    Returns:
        S tensors `[B, T, U]`; those of step s speak of token t + 2 + s. What comes of tokens of another text, or behind
        the row's end, means nothing.
    """
    AttentionInterface.register(_NAME, _attend)
    before = head.config._attn_implementation
    head.set_attn_implementation(_NAME)
    owner, place = owners(position_ids), torch.arange(input_ids.shape[1], device=input_ids.device)
    sees = (owner[:, :, None] == owner[:, None]) & (place[:, None] >= place)
    known, features, logits = _Steps(sees), head.features(tapped), []
    try:
        for step in range(steps):
            ids = torch.nn.functional.pad(input_ids[:, 1 + step :], (0, 1 + step))
            out = head(ids, position_ids + 1 + step, features, steps=known, **{cache_name(): known})
            features = out.hidden
            logits.append(out.logits)
    finally:
        head.set_attn_implementation(before)
    return logits
