"""Interfaces of drafts, which propose token trees.

A :class:`Draft` is what the user chooses: an n-gram look-up, another model, or an EAGLE-3 head. Its state for the
session of one target is a :class:`Drafting`, which :class:`~effpass.runtime.speculative.round.Round` calls.
"""

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
    """Interface of a method that proposes tokens.

    Attributes:
        kind: kind of the trees to grow.
        taps: indices of the target's layers whose inputs the draft reads, as in :class:`TreeSession`.
        models: models that the draft runs.
    """

    taps: tuple[int, ...]

    @property
    def models(self) -> tuple[Any, ...]: ...

    @property
    def kind(self) -> TreeKind: ...

    def check(self, target: Any) -> None:
        """Raise a :class:`ModelError` if the draft is for another model than `target`, or on another device."""

    def running(self) -> AbstractContextManager[Any]:
        """Return a context in which the objects that :meth:`start` returned are used."""

    def start(self, target: TreeSession) -> Drafting:
        """Create the state of the draft, including its buffers, for the session of a target."""


class Drafting(Protocol):
    """Interface of the state of a draft for one target's session."""

    def begin(self, ids: Tensor, is_token: Tensor | None, chunk: int) -> None:
        """Run the prompt, after the target has.

        Args:
            ids, is_token, chunk: as for :meth:`TreeSession.prefill`.
        """

    def extend(self, progress: Progress) -> Tensor:
        """Run up to `kind.catches_up` emitted tokens that the draft has not seen; return the last logits `[B, V]`."""

    def propose(self, progress: Progress, sampled: Sampled | None) -> TokenTree:
        """Call :meth:`extend`, and propose the next tree; `sampled` is as for :meth:`Grower.grow`."""

    def recording(self) -> AbstractContextManager[Any]:
        """Return a context in which `extend` and `propose` are recorded in a CUDA graph."""

    def state(self) -> list[Tensor]:
        """Return the tensors that `extend` and `propose` change."""

    def has_moved(self) -> bool:
        """Return whether recorded CUDA graphs are outdated, because weights have moved in memory."""
