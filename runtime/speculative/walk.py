"""Acceptance of tree nodes on the host, by logits processors and stopping criteria that need whole sequences.

:class:`~effpass.runtime.speculative.round.Round` uses it instead of the device operator
:func:`~effpass.lowering.ops.tree_acceptance.accept_tokens` if a processor or criterion sees more than scores and last
tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PrefixConstrainedLogitsProcessor, StoppingCriteriaList

import effpass.lowering.ops.token_noise  # noqa: F401  (registers the operator)
from effpass.core.errors import EffpassError
from effpass.runtime.speculative.progress import Progress
from effpass.runtime.speculative.tree import TokenTree

__all__ = ["Walk"]


class Walk:
    """Walks each sequence's tree from its root, node by node.

    Processors and criteria see the sequence up to the node, as in plain decoding. As some processors keep a state for
    each sequence of the batch, they are called with all sequences, cut or padded to the same number of columns, and
    their results for the other sequences are ignored.

    Args:
        progress: progress of the generation, which is updated.
        rows: number of sequences in use.
        processors, criteria: logits processors and stopping criteria that transformers prepared.
        samples: whether tokens are sampled, instead of chosen greedily.
    """

    def __init__(
        self, progress: Progress, rows: int, processors: LogitsProcessorList, criteria: StoppingCriteriaList,
        samples: bool,
    ) -> None:  # fmt: skip
        self._progress, self._rows = progress, rows
        self._processors, self._criteria, self._samples = processors, criteria, samples

    def accept(self, tree: TokenTree, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Accept a path of each sequence's tree, given the target's logits `[B, N, V]`.

        Returns:
            Nodes of the paths, int64 `[B, J]`, and the number of nodes to commit, int64 `[B]`, as
            :func:`~effpass.lowering.ops.tree_acceptance.accept_tokens` returns them.
        """
        progress, device = self._progress, logits.device
        ids, tokens, parents = progress.ids[: self._rows], tree.tokens.tolist(), tree.parents.tolist()
        counts, goes = progress.count.tolist(), (progress.position >= 0).tolist()
        path, gained = torch.zeros(len(goes), tree.depth + 1, dtype=torch.long), [0] * len(goes)
        for row in [row for row, alive in enumerate(goes) if alive]:
            node: int | None = 0
            while node is not None:
                path[row, gained[row]] = node
                end = counts[row] + gained[row]
                token = self._next(ids[:, :end], row, logits[row, node])
                ids[row, end] = token
                gained[row] += 1
                if bool(self._criteria(ids[:, : end + 1], None)[row]):  # type: ignore[arg-type]
                    goes[row] = False
                    break
                below = (i for i, above in enumerate(parents[row]) if above == node and tokens[row][i] == token)
                node = next(below, None)
            progress.root[row] = token
        emitted, goes_on = torch.tensor(gained, device=device), torch.tensor(goes, device=device)
        is_node = (tree.parents >= 0) & (emitted > 0)[:, None]
        progress.count.add_(emitted)
        progress.position.copy_(torch.where(goes_on, progress.position + emitted, -1))
        progress.goes_on.copy_(goes_on.any())
        progress.totals.add_(torch.stack(((emitted > 0).sum(), is_node.sum())))
        return path.to(device), torch.where(goes_on, emitted, 0)

    def _next(self, seen: Tensor, row: int, logits: Tensor) -> int:
        scores: Any = logits.float()
        if self._processors:
            scores = self._processors(seen, scores.expand(len(seen), -1).clone())[row]  # type: ignore[arg-type]
        if not self._samples:
            return int(scores.argmax(-1))
        column = torch.full((row + 1, 1), seen.shape[1], device=scores.device)  # noise depends on `row`
        noise = torch.ops.effpass.token_noise(self._progress.seed, column, len(scores))[row, 0]
        return int((scores.softmax(-1) / noise).argmax(-1))


def check_processors(processors: LogitsProcessorList, rows: int) -> None:
    """Raise an :class:`EffpassError` for a processor that depends on the index of a sequence in the batch."""
    if rows > 1 and any(isinstance(p, PrefixConstrainedLogitsProcessor) for p in processors):
        raise EffpassError(
            f"prefix_allowed_tokens_fn of a batch of {rows} rows has no place in speculative decoding, which asks for"
            " one sequence at a time",
            hint="leave the draft out, or generate one sequence at a time",
        )
