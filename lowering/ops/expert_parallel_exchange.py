"""Communication between the ranks of an expert-parallel layer, on torch.distributed.

Counts and whole outputs use functional collectives. Rows (tokens sent to one rank, and their sums) use
`all_to_all_single`, which writes them directly to where they are read; a functional collective would return a new
tensor per stage, and concatenating these would cost another write and read of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from effpass.core.errors import EffpassError

__all__ = ["Exchange", "Ranks", "ranks_of"]


@dataclass(frozen=True)
class Exchange:
    """An exchange of rows in progress.

    Attributes:
        into: buffer that receives the rows.
        rows: rows being sent, kept alive until the exchange is complete.
        work: handle of torch.distributed.
    """

    into: Tensor
    rows: Tensor
    work: Any

    def wait(self) -> Tensor:
        """Wait and return the received rows. On a GPU the current stream waits, and the host continues."""
        with _telling("rows"):
            self.work.wait()
        return self.into


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a layer's experts.

    Attributes:
        group: process group.
        name: name of the group.
        size: number of ranks W.
        me: rank of this process in the group.
    """

    group: Any
    name: str
    size: int
    me: int

    def counts(self, mine: Tensor, header: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Gather the counts of all ranks on the host. This is the only point at which a layer waits for its device.

        Args:
            mine: int64 [3, E], counts of this rank.
            header: numbers that are sent along.

        Returns:
            Counts int64 [W, 3, E] and headers [W, len(header)].
        """
        sent = torch.cat((mine.reshape(-1), torch.tensor(header, device=mine.device)))
        with _telling("counts"):
            every = torch.ops._c10d_functional.all_gather_into_tensor(sent, self.size, self.name)
            found = torch.ops._c10d_functional.wait_tensor(every).cpu().numpy().reshape(self.size, -1)
        return found[:, : mine.numel()].reshape(self.size, *mine.shape), found[:, mine.numel() :]

    def send(self, rows: Tensor, sent: list[int], into: Tensor, got: list[int]) -> Exchange:
        """Start an exchange that sends `sent[r]` of `rows` to rank r and receives `got[r]` from rank r into `into`."""
        with _telling("rows"):
            work = dist.all_to_all_single(into, rows, got, sent, group=self.group, async_op=True)
        return Exchange(into, rows, work)

    def gather(self, rows: Tensor) -> Tensor:
        """Concatenate every rank's [n, …] to [W·n, …]."""
        with _telling("outputs"):
            every = torch.ops._c10d_functional.all_gather_into_tensor(rows, self.size, self.name)
            return torch.ops._c10d_functional.wait_tensor(every)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks."""
        with _telling("outputs"):
            return torch.ops._c10d_functional.wait_tensor(
                torch.ops._c10d_functional.all_reduce(values, "sum", self.name)
            )


def ranks_of(name: str) -> Ranks:
    """Return the ranks of the process group `name`.

    Raises:
        EffpassError: if there is no such group.
    """
    try:
        group = _resolve_process_group(name)  # type: ignore[arg-type]
    except (RuntimeError, ValueError, KeyError) as error:
        raise EffpassError(
            f"no process group {name!r} is up: {error}",
            hint="start with torchrun, and call torch.distributed.init_process_group() first",
        ) from error
    return Ranks(group, name, group.size(), group.rank())


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """Re-raise the error of a collective with what was exchanged and a hint."""
    try:
        yield
    except RuntimeError as error:  # base class of the errors of torch.distributed
        reason = str(error).partition("\n")[0]
        raise EffpassError(
            f"experts on several ranks: the exchange of {what} failed: {reason}",
            hint="another rank ended, or did not come to this layer in time: look at its messages first."
            " All ranks must call the model equally often; init_process_group(timeout=...) sets how long one waits",
        ) from error
