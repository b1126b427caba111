"""State of a speculative generation, in buffers of fixed address that a CUDA graph can write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import effpass.lowering.ops.ring_buffer  # noqa: F401  (registers the operators)
from effpass.runtime.session import ENDS

__all__ = ["Progress"]


class Progress:
    """Prompt and answer of every sequence, with the features that a draft reads.

    Args:
        batch: batch size B of the buffers.
        columns: maximum number of tokens C of prompt and answer together.
        device: device of the buffers.

    Attributes:
        ids: int64 `[B, C]`, token ids of prompt and answer.
        count: int64 `[B]`, number of columns in use.
        root: int64 `[B]`, token in the last column in use, which is the root of the next tree.
        position: int32 `[B]`, position of that token; -1 for sequences that are unused or have ended.
        goes_on: bool `[]`, whether any sequence has not ended.
        totals: int64 `[2]`, number of rounds, summed over sequences, and number of nodes verified in them, without
            roots.
        ends: int64 `[ENDS]`, tokens that end a sequence, filled up with -1.
        limit: int64 `[]`, number of columns at which a sequence ends.
        seed: int64 `[]`, seed of the noise that tokens are sampled with.
        features: `[B, R, D]`, ring buffer of the target's features; entry c % R belongs to the token before column c.
            None if the draft reads none.
    """

    def __init__(self, batch: int, columns: int, device: torch.device) -> None:
        int64: dict[str, Any] = {"dtype": torch.long, "device": device}
        self.ids = torch.zeros(batch, columns, **int64)
        self.count, self.root = torch.zeros(batch, **int64), torch.zeros(batch, **int64)
        self.position = torch.full((batch,), -1, dtype=torch.int32, device=device)
        self.goes_on = torch.ones((), dtype=torch.bool, device=device)
        self.totals, self.limit, self.seed = torch.zeros(2, **int64), torch.zeros((), **int64), torch.zeros((), **int64)
        self.ends = torch.full((ENDS,), -1, **int64)
        self.features: Tensor | None = None

    def begin(self, prompt: Tensor, position: Tensor, ends: Tensor, pad: Tensor | int, limit: int) -> None:
        """Start a generation.

        Args:
            prompt: int64 `[rows, T]`, token ids of the prompts.
            position: int32 `[B]`, position of the last prompt token of each sequence; -1 for unused sequences.
            ends: int64, up to :data:`ENDS` tokens that end a sequence.
            pad: token to fill unused columns with.
            limit: number of columns at which a sequence ends.
        """
        rows, length = prompt.shape
        self.ids[:] = pad
        self.ids[:rows, :length] = prompt
        self.count.fill_(length)
        self.position.copy_(position)
        self.goes_on.fill_(True)
        self.totals.zero_()
        self.ends.fill_(-1)
        self.ends[: len(ends)].copy_(ends)
        self.limit.fill_(limit)
        self.seed.fill_(int(torch.randint(2**62, ())))

    def note(self, features: Tensor, path: Tensor, taken: Tensor) -> None:
        """Store the features of accepted nodes, after their tokens have been entered.

        Args:
            features: `[B, N, D]`, features of all nodes of a tree.
            path: int64 `[B, J]`, accepted nodes; the tokens that follow them are in the last `taken` columns in use.
            taken: int64 `[B]`, number of nodes of the path; 0 for sequences that have ended, whose features are unused.
        """
        assert self.features is not None
        torch.ops.effpass.write_ring(self.features, features, path, self.count, taken)

    def state(self) -> list[Tensor]:
        """Return the tensors that a round changes."""
        of_features = [] if self.features is None else [self.features]
        return [self.ids, self.count, self.root, self.position, self.goes_on, self.totals, *of_features]
