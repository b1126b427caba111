"""What a speculative generation has come to, in buffers that stay where they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effpass.runtime.session import ENDS

__all__ = ["Progress"]


class Progress:
    """Prompt and answer of every row, and what a draft may read of them.

    Args:
        batch: rows B.
        columns: C, of prompt and answer.
        device: where the buffers are.

    Attributes:
        ids: int64 `[B, C]`.
        count: int64 `[B]`: columns in use.
        root: int64 `[B]`: the token in the last of them, the next tree's root.
        position: int32 `[B]`: of that token; -1 in rows that are empty or have ended.
        goes_on: bool `[]`: whether any row does.
        totals: int64 `[2]`: rounds, counted row by row, and nodes verified in them, without roots.
        ends: int64 `[ENDS]`: tokens that end a row, then -1.
        limit: int64 `[]`: columns at which a row ends.
        seed: int64 `[]`: of what is sampled.
        features: `[B, R, D]`, in column c % R, of the token in front of the one in column c; None where no draft asks.
    """

    def __init__(self, batch: int, columns: int, device: torch.device) -> None:
        of: dict[str, Any] = {"dtype": torch.long, "device": device}
        self.ids = torch.zeros(batch, columns, **of)
        self.count, self.root = torch.zeros(batch, **of), torch.zeros(batch, **of)
        self.position = torch.full((batch,), -1, dtype=torch.int32, device=device)
        self.goes_on = torch.ones((), dtype=torch.bool, device=device)
        self.totals, self.limit, self.seed = torch.zeros(2, **of), torch.zeros((), **of), torch.zeros((), **of)
        self.ends = torch.full((ENDS,), -1, **of)
        self.features: Tensor | None = None

    def begin(self, prompt: Tensor, position: Tensor, ends: Tensor, pad: Tensor | int, limit: int) -> None:
        """Start behind a prompt `[rows, T]` whose last tokens stand at `position` int32 `[B]`, -1 in empty rows."""
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

    def note(self, features: Tensor, before: Tensor, path: Tensor) -> None:
        """Keep the features `[B, N, D]` of nodes `path` int64 `[B, J]`, whose tokens stand from column `before` on."""
        assert self.features is not None
        step = torch.arange(path.shape[1], device=path.device)
        row = torch.arange(len(path), device=path.device)[:, None]
        self.features[row, (before[:, None] + step) % self.features.shape[1]] = features[row, path]

    def state(self) -> list[Tensor]:
        """What a round changes."""
        of_features = [] if self.features is None else [self.features]
        return [self.ids, self.count, self.root, self.position, self.goes_on, self.totals, *of_features]
