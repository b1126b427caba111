"""GGUF files: reads the header, and converts a file to a plain safetensors checkpoint in the cache.

transformers unpacks GGUF blocks in Python, which takes SmolLM2-135M about twenty seconds. The unpacked checkpoint is
kept in :func:`cache_dir`, so that only the first load takes that time.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import struct
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from effpass.core.errors import ModelError
from effpass.core.model_config import check_causal_lm, read_config

__all__ = ["GgufHeader", "cache_dir", "read_gguf_header", "unpacked_checkpoint"]

_MAGIC = b"GGUF"
# Bytes that are hashed to identify a file. They contain metadata and tokenizer; two fine-tunes of one model differ in
# them, or in size or modification time.
_HEAD_BYTES = 1 << 20
# GGUF value type → struct format; type 8 is a string, type 9 an array
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufHeader:
    """Header of a GGUF file.

    Attributes:
        architecture: value of `general.architecture`, such as "llama".
        elements: number of elements of all tensors together.
    """

    architecture: str
    elements: int


def cache_dir() -> Path:
    """Folder of everything that effpass caches between runs; it is safe to delete.

    It is `$EFFPASS_CACHE`, else `$XDG_CACHE_HOME/effpass`, else `~/.cache/effpass`. This call does not create it.
    """
    if chosen := os.environ.get("EFFPASS_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "effpass"


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of `path` and check that every tensor lies inside the file.

    Raises:
        ModelError: the file is not a GGUF file, has a version other than 2 or 3, or is truncated or damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise ModelError(f"{path} is not a GGUF file: it does not start with the bytes 'GGUF'")
        try:
            version, tensors, pairs = struct.unpack("<IQQ", file.read(20))
            if version not in (2, 3):
                raise ModelError(f"{path} is GGUF version {version}; versions 2 and 3 can be read")
            metadata = {}
            for _ in range(pairs):
                key = _string(file, size)
                metadata[key] = _value(file, _scalar(file, "<I"), size)
            ends, elements = [0], 0
            for _ in range(tensors):
                name = _string(file, size)
                shape = [_scalar(file, "<Q") for _ in range(_scalar(file, "<I"))]
                kind, offset = _scalar(file, "<I"), _scalar(file, "<Q")
                elements += math.prod(shape)
                ends.append(offset + _tensor_bytes(path, name, shape, kind))
            alignment = metadata.get("general.alignment", 32)
            start = -(-file.tell() // alignment) * alignment
        except (struct.error, EOFError, ArithmeticError, TypeError, ValueError, RecursionError) as error:
            raise ModelError(
                f"{path} is cut short or damaged: its header can't be read", hint="download the file again"
            ) from error
    if start + max(ends) > size:
        raise ModelError(
            f"{path} is cut short: it has {size} bytes and its tensors need {start + max(ends)}",
            hint="download the file again",
        )
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelError(f"{path} does not say which architecture it holds (general.architecture is missing)")
    return GgufHeader(architecture, elements)


def unpacked_checkpoint(path: Path) -> Path:
    """Folder with the model of the GGUF file `path` as a float32 safetensors checkpoint, including the tokenizer.

    The folder is kept in :func:`cache_dir`. Its key is a hash of the file's size, modification time and first mebibyte,
    and of the version of transformers. It is written atomically.

    Raises:
        ModelError: the architecture is not supported or not a causal LM, the file is damaged, or the cache is full or
            can't be written.
    """
    import transformers

    status = path.stat()
    with path.open("rb") as file:
        head = hashlib.sha256(file.read(_HEAD_BYTES)).hexdigest()
    identity = f"{status.st_size} {status.st_mtime_ns} {head} {transformers.__version__}"
    folder = cache_dir() / "gguf" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if folder.is_dir():
        return folder

    header = read_gguf_header(path)
    known = _known_architectures()
    if header.architecture not in known:
        raise ModelError(
            f"{path} holds the architecture {header.architecture!r}, which transformers {transformers.__version__} "
            f"does not read from GGUF",
            hint=f"use the model's safetensors checkpoint, or one of: {', '.join(sorted(known))}",
        )
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        need, free = 4 * header.elements, shutil.disk_usage(temporary).free
        if need > free:
            raise ModelError(
                f"{path} unpacks to {need / 1e9:.1f} GB of float32 weights and {cache_dir()} has {free / 1e9:.1f} GB",
                hint="point EFFPASS_CACHE at a larger disk",
            )
        _unpack(path, temporary)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, and its copy is used
                raise
    except OSError as error:
        raise ModelError(
            f"the cache folder {cache_dir()} can't be written: {error.strerror or error}",
            hint="point EFFPASS_CACHE at a folder that you can write",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _unpack(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packed: Any
    plain: Any
    check_causal_lm(read_config(path.parent, str(path), gguf_file=path.name), str(path))
    options: dict[str, Any] = {}
    try:
        # Newer versions of transformers keep the blocks packed if a kernel for them is installed.
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    try:
        packed = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # any error of the reader means that the file is not readable
        raise ModelError(f"{path} can't be read: {type(error).__name__}: {error}") from error
    # A model loaded from GGUF refuses save_pretrained, so its tensors are assigned, without a copy, to a plain one.
    config = packed.config.__class__(
        **{key: value for key, value in packed.config.to_dict().items() if key != "quantization_config"}
    )
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(packed.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = packed.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _known_architectures() -> set[str]:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = set(GGUF_SUPPORTED_ARCHITECTURES)
    try:
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

        known |= set(GGUF_CONFIG_ARCHS)
    except ImportError:
        pass
    return known


def _tensor_bytes(path: Path, name: str, shape: list[int], kind: int) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise ModelError(f"{path}: tensor {name!r} has the unknown GGUF type {kind}") from error
    return math.prod(shape) // block * size


def _scalar(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _string(file: BinaryIO, limit: int) -> str:
    length = _scalar(file, "<Q")
    if length > limit:
        raise EOFError
    data = file.read(length)
    if len(data) < length:
        raise EOFError
    return data.decode("utf-8", errors="replace")


def _value(file: BinaryIO, kind: int, limit: int) -> Any:
    if kind == _STRING:
        return _string(file, limit)
    if kind == _ARRAY:
        item, count = _scalar(file, "<I"), _scalar(file, "<Q")
        if item in _SCALARS:
            file.seek(count * struct.calcsize(_SCALARS[item]), os.SEEK_CUR)
        else:
            for _ in range(count):
                _value(file, item, limit)
        return None
    if kind not in _SCALARS:
        raise EOFError
    return _scalar(file, _SCALARS[kind])
