"""ONNX files on disk: weights beside the graph or inside it, never twice in memory.

Imports onnx: import this module lazily.
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

# A protobuf message may not reach 2 GiB; 16 MiB are left for the graph.
LARGEST_SINGLE_FILE = 2**31 - 2**24

_VARINT, _LENGTH_DELIMITED = 0, 2


def save(model: onnx_ir.Model, file: Path, data: Path) -> None:
    """Write `model`, weight by weight.

    Args:
        model: the graph, its weights still PyTorch's.
        file: the .onnx file.
        data: in the same folder, for the weights.
    """
    onnx_ir.save(model, file, external_data=data.name)


def append_metadata(file: Path, metadata: Mapping[str, str]) -> None:
    """Add metadata without reading the weights back: protobuf messages that follow one another merge."""
    more = onnx.ModelProto()
    for key, value in metadata.items():
        more.metadata_props.add(key=key, value=value)
    with file.open("ab") as end:
        end.write(more.SerializeToString())


def metadata(file: Path) -> dict[str, str]:
    """The metadata, without reading the weights.

    Raises:
        ValueError: no ONNX file, or truncated.
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
    """SHA-256 of all fields but metadata whose key starts with `prefix`.

    Raises:
        ValueError: no ONNX file, or truncated.
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
    """Number, first byte and length of each field of the model."""
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
    """The number at the stream's place `at`, and the place after it."""
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

    Args:
        file: the .onnx file.
        data: its weights; gone when they are inside.
        external_data: whether they stay in `data`; None keeps them there from 2 GB on.

    The usual way holds them three times: as tensors, as a message and as its bytes. Here the message is put together
    on disk: all that is not a weight, then one ``initializer`` field after the other.
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
    """Tag and length that stand before `length` bytes of field `number`."""
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(length)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
