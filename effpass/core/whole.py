"""Atomic writes: files and folders that exist completely or not at all, whenever the process is killed."""

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
    """Write `text` to `path` in UTF-8 atomically, replacing an existing file.

    Raises:
        OSError: the file can't be written; an existing file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def put_folder(new: Path, place: Path) -> None:
    """Move the folder `new` to `place`, replacing an existing folder.

    On Linux the two folders exchange their names in one step, and the old one is then deleted. Where the system does
    not support that, there is a moment in which `place` does not exist and the old folder has a temporary name.

    Args:
        new: folder on the same file system.
        place: final path, which is no symbolic link.

    Raises:
        OSError: the folder can't be moved; an existing folder stays at `place`.
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
    """Exchange two names by the system call renameat2, which Python does not wrap; returns whether it succeeded."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
