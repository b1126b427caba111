"""Exceptions that effpass raises. Each message says what is wrong, where, and what the user can do about it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "ArtifactError",
    "EffpassError",
    "ExportError",
    "HostMemoryError",
    "ModelError",
    "PassRefusedError",
    "PluginError",
    "RecipeError",
    "RewriteError",
    "did_you_mean",
]


class EffpassError(Exception):
    """Base class of all errors that effpass raises on purpose.

    Args:
        message: what is wrong and where, with the value received.
        hint: next step for the user, printed on a separate line; None for no hint.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n  → {hint}")
        self.message = message
        self.hint = hint


class RecipeError(EffpassError):
    """A recipe, or an option of a pass, is not valid."""


class ArtifactError(EffpassError):
    """An artifact or adapter can't be read, or does not belong to this model."""


class PluginError(EffpassError):
    """A pass can't be loaded because it is unknown, provided twice, or broken."""


class ModelError(EffpassError):
    """A model can't be loaded, or is of a kind that effpass does not support."""


class PassRefusedError(EffpassError):
    """A pass can't act where a recipe uses it.

    Reasons include an entrance that the pass does not support, an order of passes that is not possible, and
    ``require: true`` with nothing to rewrite.
    """


class RewriteError(EffpassError):
    """effpass itself failed: a pass failed or left an invalid program, or a front end could not process a graph."""


class ExportError(EffpassError):
    """An export failed or is out of tolerance; no file was left behind."""


class HostMemoryError(EffpassError):
    """A cache needs more host memory than is allowed or than the system provides."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suffix for a message about an unknown name: ``", did you mean 'budget'?"`` if one is close, else all names."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f", did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""
