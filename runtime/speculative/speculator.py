"""The speculative decoder of one model with one draft, which keeps sessions, buffers and CUDA graphs between calls.

:mod:`effpass.runtime.speculative.open_draft` creates it from the names that a user gives, and
:mod:`effpass.runtime.speculative.generation` takes a :class:`~effpass.runtime.speculative.round.Round` from it for each
generation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from effpass.core.alone import alone
from effpass.core.errors import ModelError
from effpass.runtime.attention import reading_cache
from effpass.runtime.engine import Engine
from effpass.runtime.session import Session
from effpass.runtime.speculative.drafts import Draft
from effpass.runtime.speculative.pace import Pace
from effpass.runtime.speculative.round import Round
from effpass.runtime.speculative.session import TreeSession
from effpass.runtime.speculative.sparse import settings_of

__all__ = ["Speculation", "Speculator"]

_CAPACITY_STEP = 256


@dataclass(frozen=True)
class Speculation:
    """Statistics of a generation, summed over the sequences of its batch.

    Attributes:
        rounds: number of verified trees, including plain steps, whose trees consist of a root alone.
        verified: number of verified nodes, without roots.
        tokens: number of tokens that these rounds emitted.
    """

    rounds: int
    verified: int
    tokens: int

    @property
    def acceptance_length(self) -> float:
        """Mean number of tokens per round, including the one that follows the accepted path."""
        return self.tokens / max(1, self.rounds)

    def __str__(self) -> str:
        nodes = self.verified / max(1, self.rounds)
        return f"{self.acceptance_length:.2f} tokens a step, of {nodes:.1f} proposed; {self.rounds} steps"


class Speculator:
    """Creates and reuses the rounds of a target with a draft.

    Args:
        engine: decode engine of the target.
        draft: draft that proposes trees.
        switches: whether to switch to plain steps while they are faster than rounds; False to speculate always.

    Attributes:
        last: statistics of the last generation; None before the first one.

    Raises:
        ModelError: if the draft is for another model, or a pass has replaced the model's cache by one without room for
            trees.
    """

    last: Speculation | None = None

    def __init__(self, engine: Engine, draft: Draft, *, switches: bool = True) -> None:
        model = engine.model
        if engine.new_session is not Session or getattr(model, "effpass_reader", None) is not None:
            raise ModelError(
                "a pass has replaced the cache of this model (prefix_kv, sparse_attention), and"
                " speculative decoding needs one with room for trees",
                hint="leave the pass out of the recipe, or the draft out of the call",
            )
        draft.check(model)
        self.engine, self.draft, self._switches = engine, draft, switches
        self._free: dict[int, Round] = {}
        self._paces: dict[int, Pace] = {}

    @contextmanager
    def round(self, rows: int, capacity: int) -> Iterator[tuple[Round, Pace]]:
        """Context with a round, and its pace, for `rows` sequences of up to `capacity` tokens.

        Inside, the attention of target and draft reads their caches. One thread at a time can be in it; others wait.

        Raises:
            EffpassError: if the device has too little memory.
        """
        with alone(self.engine.model, *self.draft.models):
            engine, draft = self.engine, self.draft
            found: Round | None = None
            try:
                found = self._take(rows, capacity)
                with reading_cache(engine.model), found.target.attached(), draft.running():
                    found.target.begin(rows)
                    yield found, self._paces.setdefault(found.target.batch, Pace(switches=self._switches))
            except torch.OutOfMemoryError as error:
                found = None
                self._free.clear()
                engine.release()
                raise engine.no_room(rows, capacity) from error
            finally:
                if found is not None:
                    self._free[found.target.batch] = found

    def _take(self, rows: int, capacity: int) -> Round:
        engine = self.engine
        batch = 1 << (rows - 1).bit_length() if engine.device.type == "cuda" else rows
        found = self._free.pop(batch, None)
        if found is None or found.target.capacity < capacity:
            del found  # free its memory before a larger one is allocated
            capacity += -capacity % _CAPACITY_STEP
            kind, sparse = self.draft.kind, settings_of(engine.model)
            nodes = kind.nodes if sparse is None else max(kind.nodes, sparse.tokens(kind.depth))
            target = TreeSession(engine.model, batch, capacity, nodes, engine.backend, self.draft.taps, sparse)
            found = Round(target, self.draft, capacity)
        if any([found.target.has_moved(), found.drafting.has_moved()]):  # a list, so that both update their state
            found.forget_graphs()
        return found
