"""Files and folders that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import ctypes
import os
import shutil
import uuid
from pathlib import Path

__all__ = ["put_folder", "write_text"]

# linux/fcntl.h and linux/fs.h
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write_text(path: Path, text: str) -> None:
    """Write `text` as `path`, in UTF-8, over a file that is there.

    Raises:
        OSError: the old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def put_folder(new: Path, place: Path) -> None:
    """Give the folder `new`, on the same file system, the name `place`; a folder that is there goes.

    On Linux the two exchange their names in one step. Where the system can't, there is a moment in which `place` is not
    there, and the old folder stands beside it.

    Raises:
        OSError: the old folder is where it was.
    """
    if not place.exists():
        os.rename(new, place)
        return
    if _exchange(new, place):
        shutil.rmtree(new)
        return
    old = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.old")
    os.rename(place, old)
    try:
        os.rename(new, place)
    except OSError:
        os.rename(old, place)
        raise
    shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Whether the system could let them exchange their names; Python has no name for the call."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
