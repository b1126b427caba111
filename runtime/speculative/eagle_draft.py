"""An EAGLE-3 head (:mod:`effpass.runtime.speculative.eagle_head`) as a draft.

The head reads *features* of the target, the inputs of some of its layers, and has a KV cache of its own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from effpass.core.errors import EffpassError, ModelError
from effpass.runtime.attention import reading_cache
from effpass.runtime.session import Backend
from effpass.runtime.speculative.eagle_head import EagleHead
from effpass.runtime.speculative.progress import Progress
from effpass.runtime.speculative.same_tokens import check_tokens, read_tokenizer, source_of
from effpass.runtime.speculative.session import TreeSession, decoder_layers
from effpass.runtime.speculative.shapes import Sampled, TreeKind
from effpass.runtime.speculative.tree import TokenTree

__all__ = ["EagleDraft"]


class EagleDraft:
    """Proposes tokens with an EAGLE-3 head, which continues from the features of the target.

    Args:
        head: the head, on the target's device and in its dtype.
        kind: kind of the trees to grow.
        backend: `torch.compile` backend for calls of the head; None runs its own operators.

    Raises:
        EffpassError: if nodes have more children than the draft's vocabulary has tokens.
    """

    def __init__(self, head: EagleHead, kind: TreeKind, backend: Backend | None = None) -> None:
        if kind.widest > head.head_config.draft_vocabulary:
            raise EffpassError(
                f"{kind.widest} children of a node, and the draft knows {head.head_config.draft_vocabulary} tokens"
            )
        self.head, self.kind, self.backend = head, kind, backend
        self.taps = head.head_config.taps

    def check(self, target: Any) -> None:
        text = target.config.get_text_config(decoder=True)
        ours, layers, verifier = self.head.config, len(decoder_layers(target)), self.head.verifier
        name = f"the head trained for {verifier}" if verifier else "the head"
        hint = "effpass train draft MODEL learns one for this model"
        if (ours.hidden_size, ours.vocab_size) != (text.hidden_size, text.vocab_size) or max(self.taps) >= layers:
            raise ModelError(
                f"{name} is for a model of width {ours.hidden_size} with {ours.vocab_size} tokens and more than"
                f" {max(self.taps)} layers, and this one has {text.hidden_size}, {text.vocab_size} and {layers}",
                hint=hint,
            )
        if verifier is not None and verifier != source_of(target):
            # The head does not need the model that it names, which is therefore not fetched.
            check_tokens(name, read_tokenizer(verifier, local_files_only=True), target, hint=hint)
        if self.head.device != target.device:
            raise ModelError(f"the head is on {self.head.device}, and the model on {target.device}")
        if self.head.embed_tokens.weight.is_meta:
            self.head.share(target)

    @property
    def models(self) -> tuple[Any, ...]:
        return (self.head,)

    def running(self) -> AbstractContextManager[None]:
        return reading_cache(self.head)

    def start(self, target: TreeSession) -> _Drafting:
        return _Drafting(self, target)


class _Drafting:
    """State of the draft for one target.

    The input for a token consists of the token and the features of the token before it. The first token of a sequence
    has no such features, and its slot in the cache is padding.
    """

    def __init__(self, draft: EagleDraft, target: TreeSession) -> None:
        kind, batch, device = draft.kind, target.batch, target.model.device
        nodes = max(kind.steps, kind.catches_up)
        self._head, self._target, self.names = draft.head, target, draft.head.d2t
        self._session = _HeadSession(draft.head, batch, target.capacity, nodes, draft.backend)
        self._grower = kind.grower(batch, device)
        self._entered = torch.zeros(batch, dtype=torch.long, device=device)  # number of columns that the cache holds
        self._chain = torch.arange(kind.catches_up, device=device).expand(batch, -1)
        self._hidden: Tensor  # hidden states of the last nodes that were run

    def begin(self, ids: Tensor, is_token: Tensor | None, chunk: int) -> None:
        session, tapped = self._session, self._target.prompt_features
        assert tapped is not None
        features = torch.nn.functional.pad(self._head.features(tapped), (0, 0, 1, -1))
        known = torch.ones_like(ids, dtype=torch.bool) if is_token is None else is_token
        has_features = torch.nn.functional.pad(known, (1, -1)) & known
        session.begin(len(ids))
        session.prefill(ids, has_features, chunk, features=features)
        session.cache.begin_tree()
        self._entered.fill_(ids.shape[1])

    def extend(self, progress: Progress) -> Tensor:
        assert progress.features is not None
        width = self._chain.shape[1]
        tapped = torch.ops.effpass.read_ring(progress.features, self._entered, 0, width)
        tokens, positions, chain, taken = torch.ops.effpass.take_tokens(
            progress.ids, progress.count, progress.position, self._entered, width
        )
        logits, hidden = self._session.run(tokens, positions, chain, tapped=tapped, taken=taken)
        assert hidden is not None
        self._session.cache.commit(self._chain, taken)
        self._hidden = hidden
        return logits[:, 0]

    def propose(self, progress: Progress, sampled: Sampled | None) -> TokenTree:
        return self._grower.grow(self, progress.root, progress.position, self.extend(progress), sampled)

    def step(self, tokens: Tensor, positions: Tensor, ancestors: Tensor, up: Tensor, first: int) -> Tensor:
        above = self._hidden.gather(1, up[:, :, None].expand(-1, -1, self._hidden.shape[2]))
        logits, hidden = self._session.run(tokens, positions, ancestors, first, features=above)
        assert hidden is not None
        self._hidden = hidden
        return logits

    def recording(self) -> AbstractContextManager[None]:
        return self._session.recording()

    def state(self) -> list[Tensor]:
        return [self._entered, self._session.cache.lengths, self._session.cache.slots.positions]

    def has_moved(self) -> bool:
        return self._session.has_moved()


class _HeadSession(TreeSession):
    """A session of a head, whose calls return the head's hidden states in place of features.

    The input is `features` of the head, or else `tapped`, the target's features that the head computes them from.
    """

    inputs_of_tokens = frozenset(("features",))

    def __init__(self, head: EagleHead, batch: int, capacity: int, nodes: int, backend: Backend | None) -> None:
        super().__init__(head, batch, capacity, nodes, backend)

        def call(*, tapped: Tensor | None = None, **arguments: Any) -> tuple[Tensor, Tensor]:
            if tapped is not None:
                arguments["features"] = head.features(tapped)
            out = head.forward(**arguments)
            return out.logits, out.hidden

        self._function = call

    def begin(self, rows: int) -> None:
        super().begin(rows)
        self._position[:rows] = 0  # position of the first token, which has no features; the next one is at 1
