"""A file of text, as token ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effpass.cli.console import stderr

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ArtifactFolder", "TextFile", "ids_of", "most_tokens", "pieces", "read_text", "tell_sample"]

TextFile = Annotated[
    Path,
    typer.Option("--data", "-d", metavar="FILE", help="Text in UTF-8, as the model will see it.", show_default=False),
]
ArtifactFolder = Annotated[
    Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the artifact goes.", show_default=False)
]


def tell_sample(length: int) -> None:
    """Say that a sample of so many tokens was run."""
    stderr().print(f"a sample of {length} tokens", markup=False)


def read_text(path: Path, option: str = "--data") -> str:
    """What `option` names, before anything slow begins.

    Raises:
        EffpassError: it is no text in UTF-8, or empty.
    """
    from effpass.core.errors import EffpassError

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EffpassError(f"{option} {path}: can't be read as UTF-8 text: {error}", hint="give a text file") from error
    if not text.strip():
        raise EffpassError(f"{option} {path}: there is no text in it")
    return text


def ids_of(text: str, loaded: Any, model: str) -> Tensor:
    """Token ids int64 `[1, T]`.

    Raises:
        ModelError: the model has no tokenizer.
    """
    from effpass.core.errors import ModelError

    if loaded.tokenizer is None:
        raise ModelError(f"{model} has no tokenizer", hint="save the tokenizer into the model's folder")
    return loaded.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]


def most_tokens(tokens: int, model: Any) -> int:
    """`tokens` of a sample, or as many as the model has positions for."""
    return min(tokens, getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or tokens)


def pieces(ids: Tensor, length: int, count: int, least: int = 1) -> Iterator[Tensor]:
    """Pieces int64 `[1, length]` of `ids` `[1, T]`, up to `count`; the last one may be as short as `least`."""
    for first in range(0, min(ids.shape[1], length * count), length):
        piece = ids[:, first : first + length]
        if first == 0 or piece.shape[1] >= least:
            yield piece
