"""Paths that begin with ``~``."""

from __future__ import annotations

import os
from pathlib import Path

from effpass.core.errors import EffpassError

__all__ = ["expand_user"]


def expand_user(path: str | os.PathLike[str]) -> Path:
    """Return `path` with a leading ``~`` or ``~user`` replaced by that home folder.

    Raises:
        EffpassError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise EffpassError(f"{path}: there is no home folder of that name", hint="write the folder in full") from error
