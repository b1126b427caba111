"""Planning of a cache with a budget: how many tokens the layers keep of a prompt, and how they grow while decoding.

:class:`Settings` holds the options, :class:`Limits` applies the budget to one prompt, and :class:`Growth` gives the
number of tokens of one layer as the sequence gets longer. :class:`~effpass.runtime.prefix_kv.session.BudgetSession`
uses all three.
"""

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
    """Settings of a cache with a budget.

    Attributes:
        policy: method that shares out the budget.
        budget: size of the cache of all layers with full attention.
        sink: number of first tokens of each sequence that are always kept.
        recent: number of last tokens of each sequence that are always kept.
        page: granularity in tokens; layers keep multiples of it if the total allows.
        kv_cache_dtype: dtype in which keys and values are stored; ``"auto"`` is the model's dtype.
        every: number of decode steps between two evictions.
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
    """Numbers of tokens that the layers with full attention may keep of one prompt.

    Attributes:
        length: number of tokens N of the longest sequence, including those of earlier turns.
        total: number of its tokens that all layers keep together.
        low: minimum number of tokens that each layer keeps.
        high: for each layer, number of tokens that are available, the maximum to keep.
    """

    length: int
    total: int
    low: int
    high: Sequence[int]

    @classmethod
    def of(
        cls, settings: Settings, length: int, rows: int, high: Sequence[int], pinned: int, token_bytes: float
    ) -> Limits:
        """Apply the budget of `settings` to a prompt.

        Args:
            settings: settings with the budget and the number of protected tokens.
            length: number of tokens N of the longest sequence, including those of earlier turns.
            rows: number of sequences.
            high: for each layer with full attention, number of tokens that are available.
            pinned: maximum over sequences of the number of tokens that the caller asked to keep.
            token_bytes: bytes of one token in all of these layers.

        Raises:
            EffpassError: if the budget is smaller than the number of protected tokens.
        """
        mean = settings.budget.mean(length, rows, token_bytes)
        low = min(length, settings.protected)
        if settings.budget.ratio is not None:
            mean = max(mean, low)  # a short prompt keeps its protected tokens, whatever its share
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
        """Return the number of tokens that each layer keeps, in proportion to `shares` and in multiples of the page."""
        lows = [min(self.low, most) for most in self.high]
        return apportion(shares, self.total, lows, self.high, settings.page)

    def row_counts(self, count: int, lengths: Sequence[int]) -> list[int]:
        """Return the tokens to keep of each sequence in a layer that keeps `count` tokens of the longest one."""
        return [min(count, n, max(math.ceil(count * n / self.length), min(n, self.low))) for n in lengths]


@dataclass(frozen=True)
class Growth:
    """Number of tokens that a layer keeps of a growing sequence: `max(count, ⌊rate · length⌋)`, at most `length`.

    Attributes:
        count: minimum number of tokens that the layer keeps.
        rate: share of the sequence's tokens that the layer keeps.
    """

    count: int
    rate: float

    @classmethod
    def of(
        cls, settings: Settings, counts: Sequence[int], limits: Limits, rows: int, token_bytes: float
    ) -> list[Growth]:
        """Return the growth of each layer with full attention, given its `counts` after the prompt."""
        budget, total = settings.budget, sum(counts)
        if budget.is_everything:
            return [cls(count, 1.0) for count in counts]
        if budget.ratio is not None:
            return [cls(count, min(1.0, count * len(counts) * budget.ratio / total)) for count in counts]
        most = int(budget.mean(1 << 60, rows, token_bytes))
        if limits.length <= most:  # nothing was evicted yet
            return [cls(max(count, most), 0.0) for count in counts]
        return [cls(count, 0.0) for count in counts]

    def at(self, length: int) -> int:
        return min(length, max(self.count, int(self.rate * length + 1e-6)))


def token_bytes(config: Any, element_size: int, bytes_of: Callable[[int, int], float]) -> float:
    """Return the bytes of one token's keys and values in one layer.

    Args:
        config: config of the model.
        element_size: bytes of an element in the model's dtype.
        bytes_of: function that returns the bytes of a number of elements of one head, as
            :meth:`EvictingLayer.bytes_of` does.
    """
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):  # MLA: latents, and the rotary part that all heads share
        return bytes_of(text.kv_lora_rank, element_size) + bytes_of(text.qk_rope_head_dim, element_size)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * heads * bytes_of(size, element_size)
