"""The texts of a search: one for calibration, one to choose recipes by, and one to confirm the chosen recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effpass.core.errors import EffpassError
from effpass.search.workload import Workload

__all__ = ["Texts", "builtin_text"]

_FEWEST = 2  # sequences per text; the standard error of a mean needs two


@dataclass(frozen=True)
class Texts:
    """Token ids of the texts, int64.

    Attributes:
        calibration: text that artifacts are learned from, `[1, T]`.
        selection: sequences `[W, prompt + new_tokens]`; recipes are chosen by the loss of the new tokens.
        confirmation: sequences of the same shape, on which the chosen recipe must also be within the limit.
    """

    calibration: Tensor
    selection: Tensor
    confirmation: Tensor

    @classmethod
    def of(cls, data: str, validation: str | None, tokenizer: Any, workload: Workload) -> Texts:
        """Tokenize the texts and cut them into sequences.

        Args:
            data: calibration text. Without `validation`, its first half is used for calibration and its second half to
                measure losses.
            validation: text to measure losses on. Its sequences go to selection and confirmation alternately.
            tokenizer: tokenizer of the model.
            workload: length and number of the sequences.

        Raises:
            EffpassError: the text is too short for two sequences each of selection and confirmation.
        """
        if validation is None:
            middle = len(data) // 2
            data, validation = data[:middle], data[middle:]
        calibration, ids = _ids(data, tokenizer), _ids(validation, tokenizer)
        start = ids[:, :1] if tokenizer.bos_token_id is not None and ids[0, 0] == tokenizer.bos_token_id else ids[:, :0]
        body = workload.length - start.shape[1]  # each sequence begins with the BOS token, if there is one
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
    """English prose that comes with Python: the chapters of its reference that `help()` shows.

    Raises:
        EffpassError: this Python installation does not have them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise EffpassError("this Python comes without its reference", hint="give a text: --data FILE") from error
    return "\n\n".join(topics[name] for name in sorted(topics))
