"""The texts of a search: one to calibrate with, one to choose by, and one that nobody has chosen by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effpass.core.errors import EffpassError
from effpass.search.workload import Workload

__all__ = ["Texts", "builtin_text"]

_FEWEST = 2  # sequences, or a mean has no error


@dataclass(frozen=True)
class Texts:
    """Token ids, int64.

    Attributes:
        calibration: `[1, T]`.
        selection: `[W, prompt + new tokens]`: recipes are chosen by the loss of its new tokens.
        confirmation: likewise; the chosen recipe has to hold on it.
    """

    calibration: Tensor
    selection: Tensor
    confirmation: Tensor

    @classmethod
    def of(cls, data: str, validation: str | None, tokenizer: Any, workload: Workload) -> Texts:
        """
        Args:
            data: calibrates; without `validation` its first half does, and losses are measured on the second.
            validation: losses are measured on it.

        Raises:
            EffpassError: too few tokens for two sequences of each kind.
        """
        if validation is None:
            middle = len(data) // 2
            data, validation = data[:middle], data[middle:]
        calibration, ids = _ids(data, tokenizer), _ids(validation, tokenizer)
        start = ids[:, :1] if tokenizer.bos_token_id is not None and ids[0, 0] == tokenizer.bos_token_id else ids[:, :0]
        body = workload.length - start.shape[1]  # each piece begins as a text of its own does
        ids = ids[:, start.shape[1] :]
        count = min(2 * workload.sequences, ids.shape[1] // body // 2 * 2)
        if count < 2 * _FEWEST:
            raise EffpassError(
                f"the text that losses are measured on has {ids.shape[1]} tokens, and {2 * _FEWEST} sequences of"
                f" {workload.length} take {2 * _FEWEST * body}",
                hint="give a longer text (--validation), or shorter prompts (--prompt)",
            )
        first = [i * (ids.shape[1] - body) // (count - 1) for i in range(count)]
        pieces = torch.cat([torch.cat([start, ids[:, at : at + body]], 1) for at in first])
        return cls(calibration, pieces[::2].contiguous(), pieces[1::2].contiguous())


def _ids(text: str, tokenizer: Any) -> Tensor:
    return tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].long()


def builtin_text() -> str:
    """English prose that is on every machine: the chapters of Python's reference that `help()` shows.

    Raises:
        EffpassError: this Python has none.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise EffpassError("this Python comes without its reference", hint="give a text: --data FILE") from error
    return "\n\n".join(topics[name] for name in sorted(topics))
