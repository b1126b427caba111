"""Dense recomputation of the tokens that sparse verification has entered in the cache.

A dense call runs these tokens again, and its keys and values replace those of the sparse calls. The number of tokens
differs between sequences, but the call has a fixed shape, so that it is due before any sequence may have more tokens
than it takes.
"""

from __future__ import annotations

import torch

from effpass.lowering.ops.ancestors import pack
from effpass.runtime.speculative.progress import Progress
from effpass.runtime.speculative.session import TreeSession

__all__ = ["DenseAgain"]


class DenseAgain:
    """Tracks the tokens that sparse calls of one target have entered, and runs them again.

    Args:
        target: session of the target, whose tree has room for a chain of `tokens` nodes.
        progress: progress of the generation, in which the token of column c is in slot c of the cache.
        tokens: maximum number of tokens per sequence that one dense call runs.

    Attributes:
        known: int32 `[B]` on the device, number of leading slots of each prefix that dense calls have entered.
    """

    def __init__(self, target: TreeSession, progress: Progress, tokens: int) -> None:
        device = target.model.device
        self._target, self._progress, self._tokens = target, progress, tokens
        self.known = torch.zeros_like(target.cache.lengths)
        self._step = torch.arange(tokens, device=device).expand(target.batch, -1)
        self._chain = pack(torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril())
        self.begin()

    def begin(self) -> None:
        """Restart after a prompt, all of whose tokens were entered by dense calls."""
        # Maximum number of tokens per sequence that sparse calls have entered since the prompt or the last dense call,
        # counted on the host to avoid synchronization.
        self._entered = 0

    def is_due(self, tokens: int) -> bool:
        """Count a sparse call that enters up to `tokens` tokens, and return whether to call :meth:`run` before it."""
        if self._entered == 0:
            self.known.copy_(self._target.cache.lengths)
        is_due = self._entered + tokens > self._tokens
        self._entered = tokens if is_due else self._entered + tokens
        return is_due

    def run(self) -> None:
        """Run the tokens again in one dense call, with device operations only."""
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
