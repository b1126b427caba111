"""Errors that effpass raises. Each says what is wrong, where, and the way out."""

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
    """Base of every error that effpass raises on purpose.

    Args:
        message: what is wrong and where, with the value received.
        hint: the user's next step; printed on a line of its own.
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
    """A pass can't be loaded: unknown, duplicate or broken."""


class ModelError(EffpassError):
    """A model can't be loaded or is of a kind that effpass does not rewrite."""


class PassRefusedError(EffpassError):
    """A pass that must act (``require: true``, or a call that came too late for its model stage) can't."""


class RewriteError(EffpassError):
    """effpass itself failed: a pass left a program that is not valid, or a front end met a surprise."""


class ExportError(EffpassError):
    """An export failed or is out of tolerance; no file was left behind."""


class HostMemoryError(EffpassError):
    """Host memory that a cache needs is not allowed, or the system does not give it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``", did you mean 'budget'?"`` when a known name is close to `name`, else the list of known names."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f", did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""
