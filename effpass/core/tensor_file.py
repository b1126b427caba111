"""Reads safetensors files that may be truncated or hostile: the header is checked in full before a tensor is created.

Layout: N as 8 bytes little-endian, N bytes of JSON ``{name: {"dtype", "shape", "data_offsets": [begin, end]}}``
(optionally with ``"__metadata__"``, a mapping of strings), then the bytes of the tensors, which must fill the rest of
the file without gap or overlap.
"""

from __future__ import annotations

import math
import os
import stat
from pathlib import Path
from typing import Any

import torch

from effpass.core.errors import ArtifactError
from effpass.core.strict_json import parse_json

__all__ = ["check_safetensors", "read_safetensors"]

# The limit of the format. Parsing a header takes about ten times its size in memory.
_MAX_HEADER = 100_000_000

_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file, by name, to the CPU.

    Raises:
        ArtifactError: the file does not exist, is truncated, or its header is not valid. The message names the problem
            and the tensor.
    """
    path = Path(path)
    check_safetensors(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: can't be read: {error}") from error


def check_safetensors(path: Path) -> tuple[dict[str, Any], int]:
    """Check the header of a safetensors file in full.

    Returns:
        The header, and the offset in bytes at which the tensors start.

    Raises:
        ArtifactError: as in :func:`read_safetensors`.
    """
    try:
        return _check_header(path)
    except OSError as error:
        raise ArtifactError(f"{path}: can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ArtifactError(
            f"{path}: not a valid safetensors file: {error}", hint="copy or download the file again"
        ) from error


def _check_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header and the offset of the tensors; raises a ValueError that describes the fault of the file."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > status.st_size - 8:
            raise ValueError(f"truncated: {status.st_size} bytes, the header alone should have {length}")
        if length > _MAX_HEADER:
            raise ValueError(f"its header has {length} bytes, more than the {_MAX_HEADER} that the format allows")
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must hold strings")
    spans = sorted((*_check_entry(name, entry), name) for name, entry in header.items() if name != "__metadata__")
    at = 0
    for begin, end, name in spans:
        if begin != at:
            problem = "overlaps the tensor before it" if begin < at else "leaves a gap before it"
            raise ValueError(f"tensor {name!r} at bytes {begin} to {end} {problem}, which ends at {at}")
        at = end
    if at != status.st_size - 8 - length:
        raise ValueError(f"truncated or too long: {status.st_size - 8 - length} bytes of tensors, expected {at}")
    return header, 8 + length


def _check_entry(name: str, entry: Any) -> tuple[int, int]:
    """Begin and end offset of a tensor; raises a ValueError that describes the fault of its header entry."""
    if not name or name.startswith("/") or ".." in name.split("/") or not name.isprintable():
        raise ValueError(f"{name!r} is no tensor's name")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} needs dtype, shape and data_offsets and nothing else")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {dtype!r}; known: {', '.join(_DTYPES)}")
    for key in ("shape", "data_offsets"):
        if not isinstance(entry[key], list) or not all(
            type(size) is int and 0 <= size < 1 << 63 for size in entry[key]
        ):
            raise ValueError(f"tensor {name!r} has {key} {entry[key]!r}")
    if len(entry["data_offsets"]) != 2:
        raise ValueError(f"tensor {name!r} has data_offsets {entry['data_offsets']!r}")
    begin, end = entry["data_offsets"]
    expected = math.prod(entry["shape"]) * _DTYPES[dtype].itemsize
    if end - begin != expected:
        raise ValueError(f"tensor {name!r} ({dtype} {entry['shape']}) has {end - begin} bytes, expected {expected}")
    return begin, end
