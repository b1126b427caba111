"""What proposes trees."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from effpass.runtime.speculative.progress import Progress
from effpass.runtime.speculative.session import TreeSession
from effpass.runtime.speculative.shapes import Sampled, TreeKind
from effpass.runtime.speculative.tree import TokenTree

__all__ = ["Draft", "Drafting"]


class Draft(Protocol):
    """What there is to propose with.

    Attributes:
        kind: of the trees.
        taps: layers of the target whose inputs the draft reads, see :class:`TreeSession`.
    """

    taps: tuple[int, ...]

    @property
    def kind(self) -> TreeKind: ...

    def check(self, target: Any) -> None:
        """Raise a :class:`ModelError` where the draft is for another model than `target`, or stands elsewhere."""

    def running(self) -> AbstractContextManager[Any]:
        """What was started is used inside."""

    def start(self, target: TreeSession) -> Drafting:
        """Buffers of its own beside a target's."""


class Drafting(Protocol):
    """A draft at work for one target's session."""

    def begin(self, ids: Tensor, is_token: Tensor | None, chunk: int) -> None:
        """Start behind a prompt `ids` `[rows, T]` that the target has run; arguments are those of `prefill`."""

    def extend(self, progress: Progress) -> Tensor:
        """Run what was emitted and not seen yet, up to `kind.catches_up` tokens; logits `[B, V]` of the last."""

    def propose(self, progress: Progress, sampled: Sampled | None) -> TokenTree:
        """The next tree, after `extend`; see :class:`~effpass.runtime.speculative.shapes.Grower` for `sampled`."""

    def recording(self) -> AbstractContextManager[Any]:
        """Inside, `extend` and `propose` are recorded in a CUDA graph."""

    def state(self) -> list[Tensor]:
        """Tensors that `extend` and `propose` change."""

    def has_moved(self) -> bool:
        """Whether a graph that was recorded reads what is no longer there."""
