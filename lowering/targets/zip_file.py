"""Metadata of effpass in a ``.pt2`` archive, stored in the additional record ``{root}/extra/effpass.json``."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

from effpass.core.errors import ExportError
from effpass.core.strict_json import parse_json
from effpass.lowering.targets.manifest import digest_of
from effpass.lowering.targets.publish import sha256

__all__ = ["digest", "read", "stamp"]

_RECORD = "extra/effpass.json"
_LARGEST = 1 << 26


def stamp(file: Path, metadata: Mapping[str, str]) -> None:
    """Add `metadata` to the archive as a new record."""
    with zipfile.ZipFile(file, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/{_RECORD}", json.dumps(dict(metadata)))


def read(file: Path) -> dict[str, str]:
    """Read the metadata that :func:`stamp` added; empty if the archive has none.

    Raises:
        ExportError: if the archive or its metadata is damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if not info.filename.endswith(f"/{_RECORD}"):
                    continue
                if info.file_size > _LARGEST:
                    raise ValueError(f"its record of effpass has {info.file_size} bytes")
                content = parse_json(archive.read(info))
                if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
                    raise ValueError("its record of effpass holds other things than text")
                return content
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, NotImplementedError) as error:
        raise ExportError(f"{file.name} is no whole .pt2 archive: {error}", hint="copy or export it again") from error
    return {}


def digest(file: Path) -> str:
    """Return the SHA-256 over names and contents of all records except the metadata of effpass.

    Raises:
        ExportError: if a record is damaged.
    """
    parts = []
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if not info.filename.endswith(f"/{_RECORD}"):
                    with archive.open(info) as record:
                        parts.append(f"{info.filename} {sha256(record)}")  # type: ignore[arg-type]
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        raise ExportError(f"{file.name} was changed or cut: {error}", hint="copy or export it again") from error
    return digest_of(parts)
