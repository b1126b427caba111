"""Atomic publication of exported files: they are written to a temporary folder next to their path, then renamed.

A file therefore appears at its path only once it is complete and has passed its checks.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from effpass.core.errors import ExportError
from effpass.lowering.targets.target import Target

__all__ = ["check_output", "check_room", "published", "sha256"]


def check_output(path: Path, target: Target, *, overwrite: bool = False) -> None:
    """Raise an :class:`ExportError` unless `path` can be written.

    The parent folder is created if it is missing, and temporary folders that terminated exports to `path` left behind
    are removed.
    """
    if path.is_dir():
        raise ExportError(f"{path} is a folder", hint=f"name the file: {path / f'model{target.suffix}'}")
    if path.suffix != target.suffix:
        raise ExportError(
            f"{path} does not end in {target.suffix}, as files for {target.name} do",
            hint=f"use {path.with_suffix(target.suffix)}, or choose another target",
        )
    there = [p for p in (path, *target.beside(path)) if p.exists()]
    if there and not overwrite:
        raise ExportError(f"{there[0]} exists", hint="choose another file, or pass overwrite (--overwrite)")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=path.parent).cleanup()
    except OSError as error:
        raise ExportError(
            f"the folder {path.parent} can't be written: {error.strerror}", hint="choose a folder that you can write"
        ) from error
    _remove_leftovers(path)


def check_room(path: Path, size: int) -> None:
    """Raise an :class:`ExportError` if the disk of `path` has fewer than `size` bytes free."""
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise ExportError(
            f"{path} will take at least {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there",
            hint="free room, or choose another disk",
        )


@contextmanager
def published(path: Path, target: Target) -> Iterator[Path]:
    """Context manager that yields a temporary path, and moves the file written there to `path` on success.

    Companion files (:meth:`Target.beside`) are moved along. A process that is killed leaves behind a folder
    ``.{name}.*.tmp``, which the next export to `path` removes. `path` then holds the old file or the new one, or no
    file if the process was killed while a file with companion files was being renamed.

    Raises:
        ExportError: if the file does not fit on the disk, or can't be written for another reason.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f"{_working_name(path)}{os.getpid()}.", suffix=".tmp", dir=path.parent))
    try:
        file = temporary / path.name
        yield file
        pairs = list(zip(target.beside(file), target.beside(path), strict=True))
        made = [pair for pair in pairs if pair[0].exists()]
        for source, _ in [*made, (file, path)]:
            _to_disk(source)
        if made or any(place.exists() for _, place in pairs):
            path.unlink(missing_ok=True)  # the old file must never be next to the new weights
        # Companion files are moved first, so that the file itself never exists without them.
        for source, place in made:
            os.replace(source, place)
        for _, place in set(pairs) - set(made):
            place.unlink(missing_ok=True)  # companion of the file that is replaced
        os.replace(file, path)
    except OSError as error:
        raise ExportError(
            f"{path} can't be written: {error.strerror or error}", hint="free room, or choose another disk"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _working_name(path: Path) -> str:
    """Return the prefix of the temporary folders in which this machine writes `path`; the process id follows it."""
    return f".{path.name}.{platform.node()}-"


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary folders of `path` whose processes, on this machine, no longer run."""
    pattern = re.compile(re.escape(_working_name(path)) + r"(\d+)\.\w+\.tmp")
    for folder in path.parent.iterdir():
        if (found := pattern.fullmatch(folder.name)) and not _is_alive(int(found[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # the process exists, but belongs to another user
    return True


def _to_disk(file: Path) -> None:
    """Flush `file` to disk; a full disk may be reported only when the page cache is written back."""
    with file.open("rb") as written:
        os.fsync(written.fileno())


def sha256(stream: BinaryIO, length: int | None = None) -> str:
    """Return the SHA-256 of the next `length` bytes of `stream`; None reads to its end."""
    sha = hashlib.sha256()
    while length is None or length > 0:
        chunk = stream.read(1 << 22 if length is None else min(length, 1 << 22))
        if not chunk:
            break
        sha.update(chunk)
        length = None if length is None else length - len(chunk)
    return sha.hexdigest()
