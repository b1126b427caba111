"""A draft that looks up the last tokens in the preceding text and proposes what followed them.

The method is prompt look-up decoding (https://github.com/apoorvumang/prompt-lookup-decoding); it needs no draft model.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from effpass.core.errors import EffpassError
from effpass.lowering.ops.ancestors import relations
from effpass.lowering.ops.tree_growth import positions_at
from effpass.runtime.speculative.progress import Progress
from effpass.runtime.speculative.session import TreeSession
from effpass.runtime.speculative.shapes import Sampled, chain
from effpass.runtime.speculative.tree import TokenTree

__all__ = ["NGramDraft"]


class NGramDraft:
    """Proposes, as a chain, the tokens that followed the last occurrence of the longest matching n-gram.

    Args:
        depth: number of tokens to propose.
        longest: maximum length of the n-gram; if it does not occur in the text, shorter ones are looked up.

    Raises:
        EffpassError: if an argument is below 1.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, depth: int = 7, longest: int = 3) -> None:
        for name, given in (("depth", depth), ("longest", longest)):
            if given < 1:
                raise EffpassError(f"{name} of the n-gram draft is {given}", hint="give 1 or more")
        self.kind, self.longest = chain(depth), longest

    def check(self, target: Any) -> None:
        """Do nothing, as every model is supported."""

    @property
    def models(self) -> tuple[Any, ...]:
        return ()

    def running(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def start(self, target: TreeSession) -> _Drafting:
        return _Drafting(self, target.batch, target.model.device)


class _Drafting:
    def __init__(self, draft: NGramDraft, batch: int, device: torch.device) -> None:
        nodes = draft.kind.nodes
        self._longest, self._depth = draft.longest, draft.kind.depth
        self._padding = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self._parents = (torch.arange(nodes, device=device) - 1).expand(batch, -1)
        self._depths, self._ancestors = relations(self._parents, nodes)

    def begin(self, ids: Tensor, is_token: Tensor | None, chunk: int) -> None:
        # Padding precedes the tokens of a sequence, and must not match.
        self._padding.zero_()
        if is_token is not None:
            self._padding[: len(ids), 0] = (~is_token).sum(1)

    def extend(self, progress: Progress) -> Tensor:
        return progress.root  # there is nothing to run

    def propose(self, progress: Progress, sampled: Sampled | None) -> TokenTree:
        ids, last = progress.ids, (progress.count - 1)[:, None]
        column = torch.arange(ids.shape[1], device=ids.device)
        best = torch.full_like(last, -1)
        matches = column < last  # whether a match ends in the column
        for back in range(self._longest):
            wanted = last - back
            matches &= torch.roll(ids, back, 1) == ids.gather(1, wanted.clamp(min=0))
            matches &= (column - back >= self._padding) & (wanted >= self._padding)
            found = torch.where(matches, column, -1).amax(1, keepdim=True)
            best = torch.where(found >= 0, found, best)
        at = best + self._depths
        is_node = (self._depths == 0) | ((best >= 0) & (at <= last))
        tokens = torch.where(self._depths == 0, progress.root[:, None], ids.gather(1, at.clamp(0, ids.shape[1] - 1)))
        positions = torch.where(is_node, positions_at(progress.position, self._depths), -1)
        ancestors = torch.where((positions >= 0)[..., None], self._ancestors, 0)
        parents = torch.where(is_node, self._parents, -1)
        return TokenTree(tokens, parents, positions, ancestors, self._depth)

    def recording(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def state(self) -> list[Tensor]:
        return []

    def has_moved(self) -> bool:
        return False
