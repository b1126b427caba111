"""Tokens that sparse calls entered are run again densely, and their keys and values take the place of those.

Rows differ in how many they are, and one call of fixed shape takes them all: it is due before there may be more.
"""

from __future__ import annotations

import torch

from effpass.lowering.ops.ancestors import pack
from effpass.runtime.speculative.progress import Progress
from effpass.runtime.speculative.session import TreeSession

__all__ = ["DenseAgain"]


class DenseAgain:
    """What there is to run again, of one target.

    Args:
        target: its cache has room for a chain of `tokens` nodes.
        progress: the tokens; column c of them stands in slot c.
        tokens: W, that one call takes.

    Attributes:
        known: int32 `[B]`, on the device: slots of each row's prefix that hold what dense calls entered.
    """

    def __init__(self, target: TreeSession, progress: Progress, tokens: int) -> None:
        device = target.model.device
        self._target, self._progress, self._tokens = target, progress, tokens
        self.known = torch.zeros_like(target.cache.lengths)
        self._step = torch.arange(tokens, device=device).expand(target.batch, -1)
        self._chain = pack(torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril())
        self.begin()

    def begin(self) -> None:
        """The cache holds a prompt."""
        self._entered = 0  # by sparse calls since, at most; nothing asks the device

    def is_due(self, tokens: int) -> bool:
        """Whether :meth:`run` is called before a sparse call, which enters up to `tokens`; takes note of it."""
        if self._entered == 0:
            self.known.copy_(self._target.cache.lengths)
        is_due = self._entered + tokens > self._tokens
        self._entered = tokens if is_due else self._entered + tokens
        return is_due

    def run(self) -> None:
        """One dense call; device operations only."""
        cache, ids = self._target.cache, self._progress.ids
        column = self.known[:, None].long() + self._step
        there = column < cache.lengths[:, None]
        column = column.clamp(max=min(ids.shape[1], cache.base) - 1)
        tokens = torch.where(there, ids.gather(1, column), 0)
        positions = torch.where(there, cache.slots.positions.gather(1, column), -1)
        cache.lengths.copy_(self.known)
        self._target.run(tokens, positions, torch.where(there[:, :, None], self._chain, 0))
        cache.commit(self._step, there.sum(1))
        self.known.copy_(cache.lengths)
