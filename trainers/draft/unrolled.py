"""Unrolled steps of a head, at all tokens of a text in parallel (training-time test, arXiv 2503.01840, section 3).

In use, a head continues for several tokens from its own states. Training does the same: at step s the head predicts
token t + 2 + s from the features of tokens up to t. It attends to step 0, whose inputs are these features, and to its
own later steps, which belong to t only:

    step s at t attends to   step 0 at t' ≤ t   and   steps 1 ... s at t

Input tokens are those of the text, as for a draft whose previous proposals were all accepted. Texts that are packed
into one row do not attend to each other.

Shapes: B batch, T tokens, D hidden size, H heads, G KV heads, K key size, U vocabulary of the draft, S steps.
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
    """Keys and values of all previous steps, passed to the head in place of a cache.

    Attributes:
        sees: bool `[B, T, T]`, whether a query (second dimension) attends to a token (third) of step 0.
        keys, values: for each layer, `[B, G, T, K]` of each step.
    """

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
    """Attend to step 0, and to the later steps at the same token."""
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
    """Return the index of the text in its row that each token belongs to, int64 `[B, T]`, counted by positions of 0."""
    return (position_ids == 0).long().cumsum(1)


def reaches(position_ids: Tensor, steps: int) -> Tensor:
    """Return whether token t + 1 + `steps` belongs to the same text as token t, bool `[B, T]`."""
    owner = owners(position_ids)
    return torch.nn.functional.pad(owner[:, 1 + steps :], (0, 1 + steps)) == owner


def unroll(head: EagleHead, input_ids: Tensor, position_ids: Tensor, tapped: Tensor, steps: int) -> list[Tensor]:
    """Run the unrolled steps of a head.

    Args:
        head: head to run, whose attention implementation is replaced by that of this module meanwhile.
        input_ids: int64 `[B, T]`, token ids of packed texts.
        position_ids: int64 `[B, T]`, positions of the tokens, which start at 0 in each text of a row.
        tapped: `[B, T, len(taps) · D]`, features of the target.
        steps: number of steps S.

    Returns:
        Logits `[B, T, U]` of each step; those of step s at t predict token t + 2 + s. They are meaningless if that
        token belongs to another text or is beyond the end of the row.
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
