"""Token selection of a decode step: from logits to the next tokens, and to the sequences that continue.

:class:`Choice` runs transformers' logits processors and stopping criteria for the generation loop
(:mod:`effpass.runtime.generation`). If all processors depend on the scores only, and all criteria on the last token
only, every step performs the same operations on fixed buffers, which on a GPU become part of the step's CUDA graph.
Other processors and criteria receive all tokens so far and run outside of the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from effpass.lowering.ops.greedy_tokens import greedy_tokens
from effpass.runtime.session import ENDS, Session, Tail

__all__ = ["SEES_LAST_TOKEN", "SEES_SCORES", "Choice"]

SEES_SCORES = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
SEES_LAST_TOKEN = (EosTokenCriteria, MaxLengthCriteria)


class Choice:
    """Chooses tokens from a session's logits with transformers' processors and criteria.

    Args:
        session: session that has run the prompt.
        prompt: int64 `[rows, T]`, token ids of the prompt.
        new: maximum number of new tokens.
        processors: logits processors that transformers prepared.
        criteria: stopping criteria that transformers prepared.
        config: generation config that transformers prepared.

    Attributes:
        tokens: int64 `[rows]`, the tokens chosen last, which are the session's next input.
        goes_on: bool `[]`, whether any sequence is unfinished.
        lasted: int64 `[]`, number of steps after which some sequence was unfinished.
    """

    def __init__(
        self,
        session: Session,
        prompt: Tensor,
        new: int,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: Any,
    ) -> None:
        rows, self._length = prompt.shape
        self._session = session
        self._processors, self._criteria = processors, criteria
        self._samples = config.do_sample
        self.tokens = session.tokens[:rows, 0]
        answer = session.answer
        self.goes_on, self.lasted = answer.goes_on, answer.lasted
        self._ids, self._unfinished = answer.ids[:rows], answer.unfinished[:rows]
        self._pads = any(hasattr(c, "eos_token_id") for c in criteria)  # the condition that transformers uses
        ends = [c.eos_token_id.flatten() for c in criteria if isinstance(c, EosTokenCriteria)]
        count = sum(map(len, ends))
        can_end = any(not isinstance(c, MaxLengthCriteria) for c in criteria)
        kept = config.return_dict_in_generate
        self._scores: list[Tensor] | None = [] if kept and config.output_scores else None
        self._logits: list[Tensor] | None = [] if kept and config.output_logits else None
        answer.begin(prompt, config._pad_token_tensor if self._pads else None, ends, 0 if can_end else new)
        is_fixed = (
            all(type(p) in SEES_SCORES for p in processors)
            and all(type(c) in SEES_LAST_TOKEN for c in criteria)
            and count <= ENDS
            and self._scores is None
            and self._logits is None
        )
        self._tail = Tail(self._key(rows), self._fixed) if is_fixed else None

    def first(self) -> None:
        """Choose the first tokens from the prompt's logits."""
        self._choose(self._session.logits)

    def next(self) -> None:
        """Run a decode step and choose the next tokens."""
        self._session.step(self._tail)
        if self._tail is None:
            self._choose(self._session.logits)
        else:
            self._length += 1

    def output(self, length: int) -> dict[str, Any]:
        """Return the first `length` positions of the sequences, with their scores and logits if requested."""
        dropped = self._length - length
        kept = {"scores": self._scores, "logits": self._logits}
        steps = {k: None if v is None else tuple(v[: len(v) - dropped]) for k, v in kept.items()}
        return {"sequences": self._ids[:, :length].clone(), **steps}

    def _choose(self, logits: Tensor) -> None:
        if self._tail is not None:
            self._tail.run(logits)
        else:
            self._choose_from(logits, self._ids[:, : self._length])
            self._ids[:, self._length] = self.tokens
            given = None if self._scores is None else tuple(self._scores)
            self._end(self._criteria(self._ids[:, : self._length + 1], given))
        self._length += 1

    # -- operations that can be part of the CUDA graph -----------------------------------------------------------------

    def _key(self, rows: int) -> tuple[Any, ...]:
        """Return a key of the operations that `_fixed` performs; values in buffers are not part of it."""
        processors = tuple((type(p).__name__, *sorted(vars(p).items())) for p in self._processors)
        return rows, self._samples, self._pads, processors

    def _fixed(self, logits: Tensor) -> None:
        answer, rows = self._session.answer, len(self.tokens)
        if not self._samples and not self._processors:
            greedy_tokens(
                logits[:rows], answer.ends, answer.pad, self.tokens, self._ids, answer.column, self._unfinished,
                self.goes_on, self.lasted,
            )  # fmt: skip
            return
        self._choose_from(logits, self.tokens[:, None])
        self._ids.index_copy_(1, answer.column, self.tokens[:, None])
        answer.column.add_(1)
        self._end((self.tokens[:, None] == answer.ends).any(1))  # torch.isin may sort and synchronize

    def _choose_from(self, logits: Tensor, seen: Tensor) -> None:
        logits = logits[: len(self.tokens)].to(torch.float32, copy=True)
        if self._logits is not None:
            self._logits.append(logits.clone())
        scores = self._processors(seen, logits) if self._processors else logits  # type: ignore[arg-type]
        if self._scores is not None:
            self._scores.append(scores)
        if self._samples:
            tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        if self._pads:
            tokens = torch.where(self._unfinished == 1, tokens, self._session.answer.pad)
        self.tokens.copy_(tokens)

    def _end(self, ended: Tensor) -> None:
        self._unfinished.mul_(~ended)
        torch.any(self._unfinished, out=self.goes_on)
        self.lasted.add_(self.goes_on)
