"""What a budget comes to for a prompt: totals, limits, and how layers grow while decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from effpass.core.errors import EffpassError
from effpass.runtime.prefix_kv.budget import Budget
from effpass.runtime.prefix_kv.policy import Policy
from effpass.runtime.prefix_kv.search import apportion

__all__ = ["Growth", "Limits", "Settings", "token_bytes"]


@dataclass(frozen=True)
class Settings:
    """A cache with a budget.

    Attributes:
        policy: shares the budget out.
        budget: of the layers with full attention.
        sink: first tokens of each sequence that stay.
        recent: last tokens of each sequence that stay.
        page: layers keep multiples of it, where the total allows.
        kv_cache_dtype: how keys and values are stored.
        every: steps of decoding between two rounds of giving slots up.
    """

    policy: Policy
    budget: Budget
    sink: int = 4
    recent: int = 32
    page: int = 16
    kv_cache_dtype: str = "auto"
    every: int = 64

    @property
    def protected(self) -> int:
        return self.sink + self.recent


@dataclass(frozen=True)
class Limits:
    """For one prompt.

    Attributes:
        length: tokens of the longest sequence N, those of earlier turns included.
        total: tokens that all layers together keep of it.
        low: what every layer keeps at least.
        high: what each layer has.
    """

    length: int
    total: int
    low: int
    high: Sequence[int]

    @classmethod
    def of(
        cls, settings: Settings, length: int, rows: int, high: Sequence[int], pinned: int, token_bytes: float
    ) -> Limits:
        """
        Args:
            settings: with the budget.
            length: N.
            rows: sequences.
            high: what each layer with full attention has.
            pinned: tokens of a sequence that the caller asked to keep, at most.
            token_bytes: bytes of one token in all of these layers.

        Raises:
            EffpassError: the budget is below the protected tokens.
        """
        mean = settings.budget.mean(length, rows, token_bytes)
        low = min(length, settings.protected)
        if settings.budget.ratio is not None:
            mean = max(mean, low)  # a short prompt keeps what is protected
        low = min(length, low + pinned)
        if mean < low:
            asked = f", and {pinned} that keep_tokens asks for" if pinned else ""
            raise EffpassError(
                f"budget: {settings.budget} are {mean:.0f} tokens a layer, fewer than the protected ones:"
                f" {settings.sink} first, {settings.recent} last{asked}",
                hint="raise the budget, or lower sink, recent or keep_tokens",
            )
        return cls(length, min(round(mean * len(high)), sum(high)), low, high)

    def counts(self, settings: Settings, shares: Sequence[float]) -> list[int]:
        """What each layer keeps, in proportion to `shares` and in pages."""
        lows = [min(self.low, most) for most in self.high]
        return apportion(shares, self.total, lows, self.high, settings.page)

    def row_counts(self, count: int, lengths: Sequence[int]) -> list[int]:
        """What a layer that keeps `count` of the longest sequence keeps of each."""
        return [min(count, n, max(math.ceil(count * n / self.length), min(n, self.low))) for n in lengths]


@dataclass(frozen=True)
class Growth:
    """How many tokens a layer keeps of a sequence that goes on: `max(count, ⌊rate · length⌋)`.

    Attributes:
        count: what it kept of the prompt.
        rate: what it keeps of each token of the sequence.
    """

    count: int
    rate: float

    @classmethod
    def of(
        cls, settings: Settings, counts: Sequence[int], limits: Limits, rows: int, token_bytes: float
    ) -> list[Growth]:
        """Of each layer with full attention."""
        budget, total = settings.budget, sum(counts)
        if budget.is_everything:
            return [cls(count, 1.0) for count in counts]
        if budget.ratio is not None:
            return [cls(count, min(1.0, count * len(counts) * budget.ratio / total)) for count in counts]
        most = int(budget.mean(1 << 60, rows, token_bytes))
        if limits.length <= most:  # nothing had to go yet
            return [cls(max(count, most), 0.0) for count in counts]
        return [cls(count, 0.0) for count in counts]

    def at(self, length: int) -> int:
        return min(length, max(self.count, int(self.rate * length + 1e-6)))


def token_bytes(config: Any, element_size: int, bytes_of: Callable[[int, int], float]) -> float:
    """Bytes of one token's keys and values in one layer.

    Args:
        config: the model's.
        element_size: bytes of a number of the model.
        bytes_of: of so many numbers of one head; :meth:`EvictingLayer.bytes_of`.
    """
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):  # latents, and the rotated part that all heads share
        return bytes_of(text.kv_lora_rank, element_size) + bytes_of(text.qk_rope_head_dim, element_size)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * heads * bytes_of(size, element_size)
