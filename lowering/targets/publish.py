"""Files that are there whole or not at all: written in a folder of their own beside their place, then renamed."""

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

    Its folder is made where it is missing, and what exports of dead processes left of this file is removed.
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
    """Raise an :class:`ExportError` when the disk of `path` has no room for `size` bytes."""
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise ExportError(
            f"{path} will take at least {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there",
            hint="free room, or choose another disk",
        )


@contextmanager
def published(path: Path, target: Target) -> Iterator[Path]:
    """Where to write the file that will be `path`; it and what stands beside it appear when the block ends well.

    A process that is killed leaves a folder ``.{name}.*.tmp``, which the next export to `path` removes, and at `path`
    the old file or the new; none in the moment in which one file after another gets its name.

    Raises:
        ExportError: the disk can't hold the file.
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
            path.unlink(missing_ok=True)  # an old file must not stand beside new weights
        # What stands beside comes first: the file itself never stands without it.
        for source, place in made:
            os.replace(source, place)
        for _, place in set(pairs) - set(made):
            place.unlink(missing_ok=True)  # of the file that was replaced
        os.replace(file, path)
    except OSError as error:
        raise ExportError(
            f"{path} can't be written: {error.strerror or error}", hint="free room, or choose another disk"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _working_name(path: Path) -> str:
    """How names of folders begin in which this machine writes `path`; the process comes next."""
    return f".{path.name}.{platform.node()}-"


def _remove_leftovers(path: Path) -> None:
    """Remove the folders in which processes of this machine, dead by now, were writing `path`."""
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
        pass  # another user's
    return True


def _to_disk(file: Path) -> None:
    """A full disk may show only when what was written leaves the cache."""
    with file.open("rb") as written:
        os.fsync(written.fileno())


def sha256(stream: BinaryIO, length: int | None = None) -> str:
    """Digest of the next `length` bytes, or of all that is left."""
    sha = hashlib.sha256()
    while length is None or length > 0:
        chunk = stream.read(1 << 22 if length is None else min(length, 1 << 22))
        if not chunk:
            break
        sha.update(chunk)
        length = None if length is None else length - len(chunk)
    return sha.hexdigest()
