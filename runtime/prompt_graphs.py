"""Short prompts from CUDA graphs: the host queues one graph instead of the operations of all layers.

A prompt is padded on the right to one of a few sizes. The padding has no position, so that nobody reads it, and its
slots are given back after the run. A size is recorded when it occurs for the second time, because a recording takes as
long as several runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["PromptGraphs", "RecordedPrompt", "can_be_recorded", "padded_size"]

log = logging.getLogger("effpass")

_SIZES = (64, 128, 256, 512, 768, 1024)  # more tokens, over all sequences, keep the device busier than the host
_BY_LENGTH = ("dynamic", "longrope")  # rotations whose frequencies the host derives from the largest position


class RecordedPrompt(NamedTuple):
    """A prompt of a fixed size.

    Attributes:
        graph: the CUDA graph.
        ids, positions: int64 and int32 `[rows, size]`, inputs.
        last: int64 `[1]`, index of the last token that is not padding; an input.
        logits: `[rows, vocab]`, logits of that token.
        features: `[rows, size, D]`, or None if the session returns none.
        inputs: additional inputs of the model by name, each `[rows, size, ...]`.
    """

    graph: torch.cuda.CUDAGraph
    ids: Tensor
    positions: Tensor
    last: Tensor
    logits: Tensor
    features: Tensor | None
    inputs: dict[str, Tensor]

    def run(self, input_ids: Tensor, positions: Tensor, inputs: dict[str, Tensor]) -> None:
        """Run the tokens `input_ids` `[rows, T]` at `positions` `[rows, T]`, with `inputs`, each `[rows, T, ...]`."""
        tokens = input_ids.shape[1]
        self.ids[:, :tokens].copy_(input_ids)
        self.positions[:, :tokens].copy_(positions)
        self.positions[:, tokens:].fill_(-1)
        for name, given in inputs.items():
            self.inputs[name][:, :tokens].copy_(given)
        self.last.fill_(tokens - 1)
        self.graph.replay()


class PromptGraphs:
    """Recorded prompts of a session, by number of sequences and size.

    Attributes:
        pool: memory pool that all graphs share, as one runs at a time and its results are copied.
    """

    def __init__(self) -> None:
        self.pool: Any = None
        self._has_failed = False
        self._seen: set[tuple[int, int]] = set()
        self._recorded: dict[tuple[int, int], RecordedPrompt] = {}

    def forget(self) -> None:
        """Drop what was recorded, as weights have other addresses."""
        self._recorded.clear()

    def find(self, rows: int, size: int, record: Callable[[], RecordedPrompt]) -> RecordedPrompt | None:
        """Return the recorded prompt of `rows` sequences of `size` tokens; None the first time, and after a failure.

        Args:
            rows, size: sizes of the prompt.
            record: function that records the prompt.
        """
        key = rows, size
        if key not in self._seen:
            self._seen.add(key)
            return None
        if key not in self._recorded and not self._has_failed:
            if self.pool is None and torch.cuda.is_available():
                self.pool = torch.cuda.graph_pool_handle()
            try:
                self._recorded[key] = record()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # the model waits for the device, as a loop over what it found there
                self._has_failed = True
                log.warning("effpass: prompts of this model run without a CUDA graph: %s", str(error).split("\n")[0])
        return self._recorded.get(key)


def padded_size(rows: int, tokens: int) -> int | None:
    """Return the size to which `rows` prompts of `tokens` tokens are padded; None if they are too long for a graph."""
    return next((size for size in _SIZES if tokens <= size and rows * size <= _SIZES[-1]), None)


def can_be_recorded(config: Any) -> bool:
    """Return whether a model of this config computes its rotations without asking the device for positions."""
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(of.get("rope_type") for of in rope.values() if isinstance(of, dict))}
    return kinds.isdisjoint(_BY_LENGTH)
