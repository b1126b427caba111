"""A smaller model as a draft.

The draft model has a cache of its own. In every round it runs the tokens that the last round has emitted, even those
that were in its own tree, instead of moving their keys and values: this is one call of fixed shape, whose logits are
the start of the next tree.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from effpass.core.errors import EffpassError, ModelError
from effpass.runtime.attention import reading_cache
from effpass.runtime.engine import check_decodable
from effpass.runtime.session import Backend
from effpass.runtime.speculative.progress import Progress
from effpass.runtime.speculative.same_tokens import name_of
from effpass.runtime.speculative.session import TreeSession
from effpass.runtime.speculative.shapes import Sampled, TreeKind
from effpass.runtime.speculative.tree import TokenTree

__all__ = ["ModelDraft"]


class ModelDraft:
    """Proposes tokens with another model that has the same tokenizer.

    Args:
        model: a transformers causal LM in `eval()` mode on the target's device.
        kind: kind of the trees to grow.
        backend: `torch.compile` backend for calls of the draft; None runs the model's own operators.
        same_tokens: whether the tokenizers are known to be equal, so that vocabularies may have different sizes because
            of padding; only tokens that both have are then proposed.

    Raises:
        ModelError: if the decode engine can't run `model`.
        EffpassError: if nodes have more children than the draft's vocabulary has tokens.
    """

    taps: tuple[int, ...] = ()

    def __init__(
        self, model: Any, kind: TreeKind, backend: Backend | None = None, *, same_tokens: bool = False
    ) -> None:
        check_decodable(model)
        self.model, self.kind, self.backend, self._same_tokens = model, kind, backend, same_tokens
        if kind.widest > _vocabulary(model):
            raise EffpassError(f"{kind.widest} children of a node, and the draft knows {_vocabulary(model)} tokens")

    def check(self, target: Any) -> None:
        ours, theirs = _vocabulary(self.model), _vocabulary(target)
        if ours != theirs and not self._same_tokens:
            raise ModelError(
                f"the draft {name_of(self.model)} has a vocabulary of {ours} tokens, and the model one of {theirs}",
                hint="take a draft of the same family, with the same tokenizer",
            )
        if self.model.device != target.device:
            raise ModelError(f"the draft is on {self.model.device}, and the model on {target.device}")

    @property
    def models(self) -> tuple[Any, ...]:
        return (self.model,)

    def running(self) -> AbstractContextManager[None]:
        return reading_cache(self.model)

    def start(self, target: TreeSession) -> _Drafting:
        return _Drafting(self, target)


class _Drafting:
    names: Tensor | None = None

    def __init__(self, draft: ModelDraft, target: TreeSession) -> None:
        kind, batch, device = draft.kind, target.batch, target.model.device
        nodes = max(kind.steps, kind.catches_up)
        self._session = TreeSession(draft.model, batch, target.capacity, nodes, draft.backend)
        self._grower = kind.grower(batch, device)
        self._ours, self._theirs = _vocabulary(draft.model), _vocabulary(target.model)
        self._entered = torch.zeros(batch, dtype=torch.long, device=device)  # number of columns that the cache holds
        self._chain = torch.arange(kind.catches_up, device=device).expand(batch, -1)

    def begin(self, ids: Tensor, is_token: Tensor | None, chunk: int) -> None:
        self._session.begin(len(ids))
        self._session.prefill(self._named(ids), is_token, chunk)
        self._session.cache.begin_tree()
        self._entered.fill_(ids.shape[1])

    def extend(self, progress: Progress) -> Tensor:
        tokens, positions, chain, taken = torch.ops.effpass.take_tokens(
            progress.ids, progress.count, progress.position, self._entered, self._chain.shape[1]
        )
        logits = self._run(tokens, positions, chain, 0)
        self._session.cache.commit(self._chain, taken)
        last = (taken - 1).clamp(min=0)[:, None, None].expand(-1, -1, logits.shape[2])
        return logits.gather(1, last)[:, 0]

    def propose(self, progress: Progress, sampled: Sampled | None) -> TokenTree:
        return self._grower.grow(self, progress.root, progress.position, self.extend(progress), sampled)

    def step(self, tokens: Tensor, positions: Tensor, ancestors: Tensor, up: Tensor, first: int) -> Tensor:
        return self._run(tokens, positions, ancestors, first)

    def _run(self, tokens: Tensor, positions: Tensor, ancestors: Tensor, first: int) -> Tensor:
        logits, _ = self._session.run(self._named(tokens), positions, ancestors, first)
        return logits if self._theirs >= self._ours else logits[..., : self._theirs]

    def _named(self, tokens: Tensor) -> Tensor:
        """Clamp tokens to the draft's vocabulary; those beyond it are padding of the target's and occur in no text."""
        return tokens if self._theirs <= self._ours else tokens.clamp(max=self._ours - 1)

    def recording(self) -> AbstractContextManager[None]:
        return self._session.recording()

    def state(self) -> list[Tensor]:
        return [self._entered, self._session.cache.lengths, self._session.cache.slots.positions]

    def has_moved(self) -> bool:
        return self._session.has_moved()


def _vocabulary(model: Any) -> int:
    return model.config.get_text_config(decoder=True).vocab_size
