"""ONNX files on disk: weights beside the graph or inside it, never twice in memory.

Imports onnx: import this module lazily.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir

__all__ = ["append_metadata", "save"]

# A protobuf message may not reach 2 GiB; 16 MiB are left for the graph.
LARGEST_SINGLE_FILE = 2**31 - 2**24

_LENGTH_DELIMITED = 2


def save(model: onnx_ir.Model, file: Path, data: Path, *, external_data: bool | None) -> None:
    """Write `model`, weight by weight.

    Args:
        model: the graph, its weights still PyTorch's.
        file: the .onnx file.
        data: in the same folder, for the weights; gone when they are inside.
        external_data: whether weights stay in `data`; None keeps them there from 2 GB on.
    """
    weights = [v.const_value for v in model.graph.initializers.values()]
    if external_data is None:
        external_data = sum(w.nbytes for w in weights if w is not None) > LARGEST_SINGLE_FILE
    onnx_ir.save(model, file, external_data=data.name)
    if not external_data:
        _embed(file, data)


def append_metadata(file: Path, metadata: Mapping[str, str]) -> None:
    """Add metadata without reading the weights back: protobuf messages that follow one another merge."""
    more = onnx.ModelProto()
    for key, value in metadata.items():
        more.metadata_props.add(key=key, value=value)
    with file.open("ab") as end:
        end.write(more.SerializeToString())


def _embed(file: Path, data: Path) -> None:
    """Move the weights from `data` into `file`.

    The usual way holds them three times: as tensors, as a message and as its bytes. Here the message is put together
    on disk: all that is not a weight, then one ``initializer`` field after the other.
    """
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
