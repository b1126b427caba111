"""Reading and writing of ONNX files without holding their weights in memory a second time.

Weights are stored inside the file or next to it. Files are processed field by field at the level of the protobuf
encoding, so that metadata and digests do not require loading them. This module imports onnx, an optional dependency,
so import it lazily.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir

from effpass.lowering.targets.publish import sha256

__all__ = ["append_metadata", "digest", "embed", "metadata", "save"]

# Largest size of weights inside the file: a protobuf message must be smaller than 2 GiB, and 16 MiB are left for the
# graph.
LARGEST_SINGLE_FILE = 2**31 - 2**24

_VARINT, _LENGTH_DELIMITED = 0, 2


def save(model: onnx_ir.Model, file: Path, data: Path) -> None:
    """Write `model` with external weights, one weight at a time.

    Args:
        model: the model, whose weights are PyTorch tensors.
        file: path of the .onnx file.
        data: path of the file for the weights, in the same folder.
    """
    onnx_ir.save(model, file, external_data=data.name)


def append_metadata(file: Path, metadata: Mapping[str, str]) -> None:
    """Add metadata without reading the file, by appending a message: concatenated protobuf messages are merged."""
    more = onnx.ModelProto()
    for key, value in metadata.items():
        more.metadata_props.add(key=key, value=value)
    with file.open("ab") as end:
        end.write(more.SerializeToString())


def metadata(file: Path) -> dict[str, str]:
    """Read the metadata without reading the weights.

    Raises:
        ValueError: if the file is no ONNX file, or is truncated.
    """
    found = {}
    with file.open("rb") as stream:
        for number, start, length in _fields(stream):
            if number == onnx.ModelProto.METADATA_PROPS_FIELD_NUMBER:
                stream.seek(start)
                entry = onnx.StringStringEntryProto.FromString(stream.read(length))
                found[entry.key] = entry.value
    return found


def digest(file: Path, prefix: str) -> str:
    """Return the SHA-256 of each field, one per line, without metadata whose key starts with `prefix`.

    Raises:
        ValueError: if the file is no ONNX file, or is truncated.
    """
    parts = []
    with file.open("rb") as stream:
        for number, start, length in _fields(stream):
            stream.seek(start)
            if number == onnx.ModelProto.METADATA_PROPS_FIELD_NUMBER:
                if onnx.StringStringEntryProto.FromString(stream.read(length)).key.startswith(prefix):
                    continue
                stream.seek(start)
            parts.append(f"{number} {sha256(stream, length)}")
    return "\n".join(parts)


def _fields(stream: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Yield field number, byte offset and length in bytes of each top-level field of the model."""
    size = os.fstat(stream.fileno()).st_size
    at = 0
    while at < size:
        stream.seek(at)
        tag, start = _read_varint(stream, at)
        value, end = _read_varint(stream, start)
        kind = tag & 7
        if kind not in (_VARINT, _LENGTH_DELIMITED):
            raise ValueError(f"byte {at} begins no field of an ONNX model")
        start, length = (end, value) if kind == _LENGTH_DELIMITED else (start, end - start)
        if start + length > size:
            raise ValueError(f"truncated: {size} bytes, but a field ends at {start + length}")
        yield tag >> 3, start, length
        at = start + length


def _read_varint(stream: BinaryIO, at: int) -> tuple[int, int]:
    """Read the varint at byte `at`, the stream's current position; return it and the offset of the byte after it."""
    value = 0
    for index in range(10):
        byte = stream.read(1)
        if not byte:
            raise ValueError(f"truncated: it ends within the number at byte {at}")
        value |= (byte[0] & 0x7F) << 7 * index
        if byte[0] < 0x80:
            return value, at + index + 1
    raise ValueError(f"byte {at} begins no number")


def embed(file: Path, data: Path, *, external_data: bool | None) -> None:
    """Move the weights from `data` into `file`.

    With onnx's own functions the weights would be in memory three times: as tensors, as a message and as its bytes.
    Here the message is assembled on disk, first everything but the weights, then one ``initializer`` field per weight.

    Args:
        file: path of the .onnx file.
        data: path of its weights, which is removed when they are inside the file.
        external_data: whether the weights stay in `data`; None leaves them there if they exceed 2 GB.
    """
    if external_data is None:
        external_data = data.exists() and data.stat().st_size > LARGEST_SINGLE_FILE
    if external_data or not data.exists():
        return
    model = onnx.load(file, load_external_data=False)
    heads = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    inside = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    places = []
    for head in heads:
        entries = {e.key: e.value for e in head.external_data}
        places.append((int(entries["offset"]), int(entries["length"])))
        head.ClearField("external_data")
        head.ClearField("data_location")
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    graph.ClearField("initializer")
    graph.initializer.extend(inside)
    model.ClearField("graph")

    fields = []
    for head, (_, length) in zip(heads, places, strict=True):
        start = head.SerializeToString() + _field(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, length)
        fields.append(_field(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(start) + length) + start)
    body = graph.SerializeToString()
    size = len(body) + sum(map(len, fields)) + sum(length for _, length in places)
    with data.open("rb") as weights, file.open("wb") as out:
        out.write(model.SerializeToString() + _field(onnx.ModelProto.GRAPH_FIELD_NUMBER, size) + body)
        for field, (offset, length) in zip(fields, places, strict=True):
            out.write(field)
            weights.seek(offset)
            _copy(weights, out, length)
    data.unlink(missing_ok=True)


def _copy(source: BinaryIO, target: BinaryIO, length: int) -> None:
    while length > 0:
        chunk = source.read(min(length, 1 << 24))
        target.write(chunk)
        length -= len(chunk)


def _field(number: int, length: int) -> bytes:
    """Encode the tag and length that precede `length` bytes of field `number`."""
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(length)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
