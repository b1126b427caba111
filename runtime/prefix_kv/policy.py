"""Interface of the methods that share out a cache budget.

A :class:`Policy` decides how many tokens each layer keeps and by which score its tokens are ranked. The session
(:mod:`effpass.runtime.prefix_kv.session`) calls it for each prompt; :mod:`effpass.runtime.prefix_kv.peers` holds other
methods to compare PrefixKV with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.nn.functional import avg_pool1d

from effpass.runtime.prefix_kv.search import threshold_counts

__all__ = ["Policy", "pooled"]


class Policy:
    """A method of sharing out a budget. The base class is PrefixKV without a profile, which searches for each prompt.

    Attributes:
        name: name of the method.
        importance: attention that tokens are ranked by: that received from all tokens (``"full"``), from the last
            :attr:`window` ones (``"window"``), from both (``"both"``), or none (``"none"``).
        window: number of tokens at the end of the prompt whose attention is summed for ``"window"``.
        slides: whether tokens of the prompt are evicted while decoding. If True, the oldest tokens after the first
            `sink` ones are evicted; if False, the kept prompt tokens stay, and the oldest ones after them are evicted.
    """

    name: str = "prefix_kv"
    importance: Literal["full", "window", "both", "none"] = "both"
    window: int = 64
    slides: bool = False

    def shares(self, ratio: float, layers: int) -> Sequence[float] | None:
        """Return the relative number of tokens that each layer keeps, if it is known before the prompt runs.

        Args:
            ratio: budget as a share of the tokens.
            layers: number of layers with full attention.

        Returns:
            One number per layer, in any unit; None if it depends on the prompt and :meth:`counts` computes it.
        """
        return None

    def counts(self, mass: Tensor, totals: Sequence[int], low: Sequence[int], high: Tensor) -> list[list[int]]:
        """Compute how many tokens each layer keeps of each sequence, as :func:`threshold_counts` does.

        Args:
            mass: `[B, L, S]`, cumulative importance of the tokens of each layer, the most important first.
            totals: for each sequence, the number of tokens that its layers keep in total.
            low: for each layer, the minimum number of tokens.
            high: int64 `[B, L]`, number of tokens available.

        Returns:
            For each sequence, the counts of its layers.
        """
        return threshold_counts(mass, totals, low, high)

    def rank(self, from_all: Tensor, from_last: Tensor, positions: Tensor, sink: int) -> Tensor:
        """Return the score of each slot's token, float32 `[B, S]`; tokens with larger scores are kept first.

        Args:
            from_all: float32 `[B, S]`, attention that a token received from the whole prompt, averaged over heads.
            from_last: float32 `[B, S]`, attention that it received from the prompt's last :attr:`window` tokens.
            positions: int32 `[B, S]`, token positions, ascending apart from those that are -1.
            sink: number of first positions, which are always kept.
        """
        if self.importance == "none":
            raise NotImplementedError(f"{type(self).__name__} reads no attention, and has to rank tokens by itself")
        if self.importance == "both":
            return _normalized(from_all, positions, sink) + _normalized(from_last, positions, sink)
        return from_all if self.importance == "full" else from_last

    def recent(self, count: int, at_least: int) -> int:
        """Return the number of last tokens that a layer always keeps.

        Args:
            count: number of tokens that the layer keeps.
            at_least: value of the option `recent`.
        """
        return at_least


def _normalized(scores: Tensor, positions: Tensor, sink: int) -> Tensor:
    """Divide `scores` by the sum of those outside of the first `sink` positions, which are always kept."""
    return scores / scores.masked_fill(positions < sink, 0).sum(1, keepdim=True).clamp(min=1e-30)


def pooled(ranks: Tensor, width: int) -> Tensor:
    """Average each of `ranks` `[B, S]` over a window of `width` slots that is centred on it."""
    return avg_pool1d(ranks[:, None], width, stride=1, padding=width // 2, count_include_pad=False).squeeze(1)
