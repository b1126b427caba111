"""Comparison of the tokenizers of a draft and its target.

A model's tokenizer is read from where the model was loaded; a model that was made otherwise has none to compare.
"""

from __future__ import annotations

from typing import Any

from effpass.core.errors import EffpassError, ModelError
from effpass.core.model import read_source

__all__ = ["check_tokens", "name_of", "read_tokenizer", "source_of"]


def source_of(model: Any) -> str:
    """Return the folder or hub id that a model was loaded from; empty if that is not known."""
    return getattr(model.config, "_name_or_path", None) or ""


def name_of(model: Any) -> str:
    """Return what errors call a model: where it was loaded from, or else its class."""
    return source_of(model) or type(model).__name__


def read_tokenizer(source: str, *, local_files_only: bool = False) -> Any:
    """Read the tokenizer of a model; None if there is none, or `source` is empty or can't be read.

    Args:
        source: source of the model, as for `effpass.load_model`.
        local_files_only: whether not to ask the network.
    """
    try:
        return read_source(source, local_files_only=local_files_only)[1] if source else None
    except EffpassError:
        return None


def check_tokens(draft: str, tokenizer: Any, target: Any, *, hint: str) -> bool:
    """Return whether the tokenizers of a draft and its target are known to be equal.

    Args:
        draft: what errors call the draft.
        tokenizer: tokenizer of the draft; None if it is not known.
        target: the target.
        hint: next step for the user if they differ.

    Raises:
        ModelError: if they are known to differ. The message names the first token that does.
    """
    theirs = None if tokenizer is None else read_tokenizer(source_of(target))
    if theirs is None:
        return False
    first = _first_difference(tokenizer.get_vocab(), theirs.get_vocab())
    if first is None:
        return True
    token, ours, own = first
    raise ModelError(
        f"{draft} and the model {name_of(target)} have different tokenizers: {token!r} has"
        f" {_id(ours)} in the draft's and {_id(own)} in the model's",
        hint=hint,
    )


def _first_difference(ours: dict[str, int], theirs: dict[str, int]) -> tuple[str, int | None, int | None] | None:
    """Return the token with the smallest id that differs, and its id in both, None where it has none."""
    differ = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
    if not differ:
        return None
    first = min(differ, key=lambda token: (min(v[token] for v in (ours, theirs) if token in v), token))
    return first, ours.get(first), theirs.get(first)


def _id(number: int | None) -> str:
    return "no id" if number is None else f"id {number}"
