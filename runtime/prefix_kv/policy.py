"""What a method decides: how much each layer keeps, and which of its tokens go first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.nn.functional import avg_pool1d

from effpass.runtime.prefix_kv.search import threshold_counts

__all__ = ["Policy", "pooled"]


class Policy:
    """One method. The base class is PrefixKV without a profile: every prompt is searched by itself.

    Attributes:
        name: of the method.
        importance: what tokens are ranked by: the attention that they receive from all tokens (``"full"``), from the
            last :attr:`window` ones (``"window"``), ``"both"``, or nothing of the kind (``"none"``).
        window: how many last tokens are asked.
        slides: while decoding, the oldest tokens behind the first ones go. Otherwise what a prompt kept stays, and the
            oldest tokens behind it go.
    """

    name: str = "prefix_kv"
    importance: Literal["full", "window", "both", "none"] = "both"
    window: int = 64
    slides: bool = False

    def shares(self, ratio: float, layers: int) -> Sequence[float] | None:
        """What each layer keeps in proportion to the others, known before the prompt is run.

        Args:
            ratio: the budget as a share of the tokens.
            layers: layers with full attention.

        Returns:
            One number a layer, in any unit; None where it depends on the prompt, and :meth:`counts` says it.
        """
        return None

    def counts(self, mass: Tensor, totals: Sequence[int], low: Sequence[int], high: Tensor) -> list[list[int]]:
        """What each layer keeps of each sequence, from the prompt; see :func:`threshold_counts` for the arguments."""
        return threshold_counts(mass, totals, low, high)

    def rank(self, from_all: Tensor, from_last: Tensor, positions: Tensor, sink: int) -> Tensor:
        """What a layer keeps first: float32 `[B, S]`, larger is earlier.

        Args:
            from_all: float32 `[B, S]`: attention that a token received from all of the prompt, in the mean of heads.
            from_last: float32 `[B, S]`: the same from the prompt's last :attr:`window` tokens.
            positions: int32 `[B, S]`, ascending among those that are not -1.
            sink: positions below it are kept anyway.
        """
        if self.importance == "both":
            return _share(from_all, positions, sink) + _share(from_last, positions, sink)
        return from_all if self.importance == "full" else from_last

    def recent(self, count: int, at_least: int) -> int:
        """How many of the last tokens a layer that keeps `count` always keeps.

        Args:
            count: what the layer keeps.
            at_least: the option `recent`.
        """
        return at_least


def _share(scores: Tensor, positions: Tensor, sink: int) -> Tensor:
    """`scores` over the sum of those that are not kept anyway."""
    return scores / scores.masked_fill(positions < sink, 0).sum(1, keepdim=True).clamp(min=1e-30)


def pooled(ranks: Tensor, width: int) -> Tensor:
    """The mean of each of `ranks` `[B, S]` and its neighbours, `width` together."""
    return avg_pool1d(ranks[:, None], width, stride=1, padding=width // 2, count_include_pad=False).squeeze(1)
