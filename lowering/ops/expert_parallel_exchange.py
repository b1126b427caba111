"""What experts on several ranks say to each other, on torch.distributed.

Counts and whole outputs go through functional collectives. Rows go through `all_to_all_single` into the place where
they are read: a functional one returns a tensor of its own for every stage, and putting these together would cost
another write and read of all rows.
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
    """Rows on their way.

    Attributes:
        into: where they arrive.
        rows: what is sent; lives until they have arrived.
        work: of torch.distributed.
    """

    into: Tensor
    rows: Tensor
    work: Any

    def wait(self) -> Tensor:
        """What arrived. On a GPU the current stream waits and the host goes on."""
        with _telling("rows"):
            self.work.wait()
        return self.into


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a layer's experts.

    Attributes:
        group: the process group.
        name: of the group.
        size: W.
        me: this process among them.
    """

    group: Any
    name: str
    size: int
    me: int

    def counts(self, mine: Tensor, header: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The counts of all ranks, on the host: the one place where a layer waits for its device.

        Args:
            mine: int64 [3, E].
            header: numbers that travel along.

        Returns:
            int64 [W, 3, E] and [W, len(header)].
        """
        sent = torch.cat((mine.reshape(-1), torch.tensor(header, device=mine.device)))
        with _telling("counts"):
            every = torch.ops._c10d_functional.all_gather_into_tensor(sent, self.size, self.name)
            found = torch.ops._c10d_functional.wait_tensor(every).cpu().numpy().reshape(self.size, -1)
        return found[:, : mine.numel()].reshape(self.size, *mine.shape), found[:, mine.numel() :]

    def send(self, rows: Tensor, sent: list[int], into: Tensor, got: list[int]) -> Exchange:
        """Begin to send `rows`, `sent[r]` to rank r, and to receive `got[r]` from rank r into `into`."""
        with _telling("rows"):
            work = dist.all_to_all_single(into, rows, got, sent, group=self.group, async_op=True)
        return Exchange(into, rows, work)

    def gather(self, rows: Tensor) -> Tensor:
        """[W·n, …] of every rank's [n, …]."""
        with _telling("outputs"):
            every = torch.ops._c10d_functional.all_gather_into_tensor(rows, self.size, self.name)
            return torch.ops._c10d_functional.wait_tensor(every)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks."""
        with _telling("outputs"):
            return torch.ops._c10d_functional.wait_tensor(
                torch.ops._c10d_functional.all_reduce(values, "sum", self.name)
            )


def ranks_of(name: str) -> Ranks:
    """The ranks of the process group `name`.

    Raises:
        EffpassError: no such group.
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
    """An error of a collective says what it was about and where to look."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed's are
        reason = str(error).partition("\n")[0]
        raise EffpassError(
            f"experts on several ranks: the exchange of {what} failed: {reason}",
            hint="another rank ended, or did not come to this layer in time: look at its messages first."
            " All ranks must call the model equally often; init_process_group(timeout=...) sets how long one waits",
        ) from error
