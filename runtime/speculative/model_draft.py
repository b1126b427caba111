"""Another model as a draft.

It keeps a cache of its own and gets, in every round, the tokens that were emitted in the last one. It runs them again
rather than move what its own tree held: that is one call of fixed shape, and the call's logits begin the next tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from effpass.core.errors import EffpassError, ModelError
from effpass.runtime.attention import reading_cache
from effpass.runtime.engine import check_decodable
from effpass.runtime.session import Backend
from effpass.runtime.speculative.progress import Progress
from effpass.runtime.speculative.session import TreeSession
from effpass.runtime.speculative.shapes import Grower, Sampled, TreeKind
from effpass.runtime.speculative.tree import TokenTree

__all__ = ["ModelDraft"]


class ModelDraft:
    """Another model with the same tokens.

    Args:
        model: a transformers causal LM in `eval()` mode on the target's device.
        kind: the trees to grow.
        backend: as in :class:`TreeSession`.
        same_tokens: the tokenizers are known to be equal: where one vocabulary is padded further than the other, the
            tokens that both have are proposed.

    Raises:
        ModelError: the decode engine can't run `model`.
        EffpassError: a node is to have more children than there are tokens.
    """

    taps: tuple[int, ...] = ()
    names: Tensor | None = None

    def __init__(
        self, model: Any, kind: TreeKind, backend: Backend | None = None, *, same_tokens: bool = False
    ) -> None:
        check_decodable(model)
        self.model, self.kind, self._backend, self._same_tokens = model, kind, backend, same_tokens
        self._theirs = self._vocabulary = _vocabulary(model)
        if kind.widest > self._vocabulary:
            raise EffpassError(f"{kind.widest} children of a node, and the draft knows {self._vocabulary} tokens")
        self._session: TreeSession | None = None
        self._grower: Grower | None = None

    def check(self, target: Any) -> None:
        theirs = _vocabulary(target)
        if self._vocabulary != theirs and not self._same_tokens:
            raise ModelError(
                f"the draft has a vocabulary of {self._vocabulary} tokens, and the model one of {theirs}",
                hint="take a draft of the same family, with the same tokenizer",
            )
        self._theirs = theirs
        if self.model.device != target.device:
            raise ModelError(f"the draft is on {self.model.device}, and the model on {target.device}")

    @contextmanager
    def running(self) -> Iterator[None]:
        with reading_cache(self.model):
            yield

    def begin(self, target: TreeSession, ids: Tensor, is_token: Tensor | None, capacity: int, chunk: int) -> None:
        batch, device = target.batch, target.model.device
        if self._session is None or self._session.batch != batch or self._session.capacity < capacity:
            nodes = max(self.kind.steps, self.kind.catches_up)
            self._session = TreeSession(self.model, batch, capacity, nodes, self._backend)
            self._grower = self.kind.grower(batch, device)
            self._entered = torch.zeros(batch, dtype=torch.long, device=device)
            self._chain = torch.arange(self.kind.catches_up, device=device).expand(batch, -1)
        session = self._session
        session.begin(len(ids))
        session.prefill(self._named(ids), is_token, chunk)
        session.cache.begin_tree()
        self._entered.fill_(ids.shape[1])

    def extend(self, progress: Progress) -> Tensor:
        assert self._session is not None
        tokens, positions, chain, taken = torch.ops.effpass.take_tokens(
            progress.ids, progress.count, progress.position, self._entered, self.kind.catches_up
        )
        logits = self._run(tokens, positions, chain, 0)
        self._session.cache.commit(self._chain, taken)
        last = (taken - 1).clamp(min=0)[:, None, None].expand(-1, -1, logits.shape[2])
        return logits.gather(1, last)[:, 0]

    def propose(self, progress: Progress, sampled: Sampled | None) -> TokenTree:
        assert self._grower is not None
        return self._grower.grow(self, progress.root, progress.position, self.extend(progress), sampled)

    def step(self, tokens: Tensor, positions: Tensor, ancestors: Tensor, up: Tensor, first: int) -> Tensor:
        return self._run(tokens, positions, ancestors, first)

    def _run(self, tokens: Tensor, positions: Tensor, ancestors: Tensor, first: int) -> Tensor:
        assert self._session is not None
        logits, _ = self._session.run(self._named(tokens), positions, ancestors, first)
        return logits if self._theirs >= self._vocabulary else logits[..., : self._theirs]

    def _named(self, tokens: Tensor) -> Tensor:
        """Tokens without those that the draft has no place for, which no text has."""
        return tokens if self._theirs <= self._vocabulary else tokens.clamp(max=self._vocabulary - 1)

    @contextmanager
    def recording(self) -> Iterator[None]:
        assert self._session is not None
        with self._session.recording():
            yield

    def state(self) -> list[Tensor]:
        assert self._session is not None
        return [self._entered, self._session.cache.lengths, self._session.cache.slots.positions]

    def has_moved(self) -> bool:
        return self._session is None or self._session.has_moved()


def _vocabulary(model: Any) -> int:
    return model.config.get_text_config(decoder=True).vocab_size
