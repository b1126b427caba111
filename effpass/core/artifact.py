"""An artifact: what a trainer learned and a pass applies. A folder of two files.

``effpass.json``
    Which pass it is for and in which version, the options it was learned with, the model's fingerprint, where it comes
    from (`provenance`), how good it is (`metrics`), and name, shape and dtype of every tensor.
``effpass.safetensors``
    The tensors. Never a pickle.

Everything is checked before a tensor is handed out, and a folder is written whole or not at all.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effpass.core.errors import ArtifactError
from effpass.core.fingerprint import Fingerprint
from effpass.core.strict_json import parse_json
from effpass.core.tensor_file import read_safetensors
from effpass.core.whole import put_folder

__all__ = ["Artifact", "TensorSpec", "read_safetensors"]

JSON_FILE = "effpass.json"
TENSOR_FILE = "effpass.safetensors"

# Version of the files' layout, not of what a pass writes into them.
_LAYOUT = 1
_MAX_JSON = 16 << 20
_KEYS = ("effpass", "pass", "version", "options", "fingerprint", "provenance", "metrics", "tensors")

# (shape, dtype); None leaves one open.
TensorSpec = tuple[tuple[int, ...] | None, torch.dtype | None]


@dataclass(frozen=True, eq=False)
class Artifact:
    """What was learned, for which pass and which model.

    Attributes:
        pass_name: registry key of the pass.
        version: of this pass's artifacts, counted by the pass from 1.
        options: what it was learned with; JSON.
        fingerprint: the model it was learned for.
        provenance: data, seed, versions, commit; JSON.
        metrics: how good it is; JSON.
        tensors: by name, on the CPU.
    """

    pass_name: str
    version: int
    options: dict[str, Any]
    fingerprint: Fingerprint
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the artifact as `folder`, whole or not at all; an artifact that is there already is replaced.

        Raises:
            ArtifactError: `folder` holds something else, or the artifact can't be written as JSON and safetensors.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        folder = Path(folder).absolute()
        _check_replaceable(folder)
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.tensors.items()}
        try:
            text = json.dumps(self._to_json(tensors), indent=2, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{folder}: the artifact's description is no JSON: {error}") from error
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
                new = Path(temporary, "new")
                new.mkdir()
                save_file(tensors, new / TENSOR_FILE)
                (new / JSON_FILE).write_text(text + "\n", encoding="utf-8")
                Artifact.load(new, expect_pass=self.pass_name, max_version=self.version)
                put_folder(new, folder)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{folder}: can't be written: {error}") from error

    def _to_json(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return {
            "effpass": _LAYOUT,
            "pass": self.pass_name,
            "version": self.version,
            "options": self.options,
            "fingerprint": self.fingerprint.to_json(),
            "provenance": self.provenance,
            "metrics": self.metrics,
            "tensors": {
                name: {"shape": list(tensor.shape), "dtype": _dtype_name(tensor)}
                for name, tensor in sorted(tensors.items())
            },
        }

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        expect_pass: str,
        max_version: int,
        expect_tensors: Mapping[str, TensorSpec] | None = None,
    ) -> Artifact:
        """Read the artifact in `folder`.

        Args:
            expect_pass: the pass that wants it.
            max_version: the newest version that this pass reads.
            expect_tensors: the tensors there must be, no more and no less, with shape and dtype where they are known.

        Raises:
            ArtifactError: a file is missing or damaged, the artifact is another pass's or newer, or a tensor is
                missing, unknown, or of another shape or dtype; names the difference.
        """
        folder = Path(folder)
        content = _read_description(folder)
        if content["pass"] != expect_pass:
            raise ArtifactError(
                f"{folder}: an artifact for the pass {content['pass']!r}, not for {expect_pass!r}",
                hint=f"give this one to {content['pass']}",
            )
        if content["version"] > max_version:
            raise ArtifactError(
                f"{folder}: version {content['version']} of a {expect_pass} artifact, this effpass reads {max_version}",
                hint="update effpass",
            )
        try:
            fingerprint = Fingerprint.from_json(content["fingerprint"])
        except ValueError as error:
            raise ArtifactError(f"{folder / JSON_FILE}: fingerprint: {error}") from error
        tensors = read_safetensors(folder / TENSOR_FILE)
        _check_tensors(folder, tensors, _described(folder, content["tensors"]))
        if expect_tensors is not None:
            _check_tensors(folder, tensors, expect_tensors)
        described = {key: content[key] for key in ("options", "provenance", "metrics")}
        return cls(expect_pass, content["version"], fingerprint=fingerprint, tensors=tensors, **described)

    def check_model(self, model: nn.Module) -> None:
        """Raise :class:`ArtifactError` unless the artifact was learned for `model`; names the difference.

        A change of dtype is fine. To use it with other weights of the same architecture on purpose, replace the
        fingerprint's `weights` in effpass.json by ``"any"``.
        """
        self.fingerprint.check(model)


def _read_description(folder: Path) -> dict[str, Any]:
    """effpass.json, with the right keys and types."""
    path = folder / JSON_FILE
    if not folder.is_dir():
        problem = "a file, not an artifact's folder" if folder.exists() else "no such folder"
        raise ArtifactError(f"{folder}: {problem}", hint="a relative path starts from the recipe's folder")
    for file in (JSON_FILE, TENSOR_FILE):
        if not (folder / file).is_file():
            raise ArtifactError(f"{folder}: no {file} there", hint="give the folder that a trainer wrote")
    try:
        with open(path, "rb") as opened:
            data = opened.read(_MAX_JSON + 1)
        if len(data) > _MAX_JSON:
            raise ValueError(f"larger than {_MAX_JSON >> 20} MiB")
        content = parse_json(data)
    except OSError as error:
        raise ArtifactError(f"{path}: can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: not a JSON object")
    layout = content.get("effpass")
    if not _is_version(layout) or layout != _LAYOUT:
        raise ArtifactError(
            f"{path}: effpass: got {layout!r}, this effpass reads {_LAYOUT}",
            hint="a larger number needs a newer effpass",
        )
    for key in (*_KEYS, *content):
        if key not in content or key not in _KEYS:
            raise ArtifactError(f"{path}: {'unknown' if key in content else 'missing'} key {key!r}")
    if not isinstance(content["pass"], str) or not _is_version(content["version"]):
        raise ArtifactError(
            f"{path}: pass: {content['pass']!r}, version: {content['version']!r}, expected name and number"
        )
    for key in ("options", "provenance", "metrics", "tensors"):
        if not isinstance(content[key], dict):
            raise ArtifactError(f"{path}: {key}: got {content[key]!r}, expected an object")
    return content


def _described(folder: Path, tensors: dict[str, Any]) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    for name, entry in tensors.items():
        fits = isinstance(entry, dict) and set(entry) == {"shape", "dtype"} and isinstance(entry["shape"], list)
        dtype = getattr(torch, str(entry["dtype"]), None) if fits else None
        if not isinstance(dtype, torch.dtype):
            raise ArtifactError(f"{folder / JSON_FILE}: tensors: {name!r} is {entry!r}, expected shape and dtype")
        specs[name] = (tuple(entry["shape"]), dtype)
    return specs


def _check_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec]) -> None:
    for problem, names in (("missing", specs.keys() - tensors.keys()), ("unknown", tensors.keys() - specs.keys())):
        if names:
            raise ArtifactError(f"{folder / TENSOR_FILE}: {problem} tensors: {', '.join(sorted(names))}")
    for name, (shape, dtype) in specs.items():
        tensor = tensors[name]
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise ArtifactError(
                f"{folder / TENSOR_FILE}: tensor {name!r} has shape {list(tensor.shape)}, expected {list(shape)}"
            )
        if dtype is not None and tensor.dtype != dtype:
            expected = str(dtype).removeprefix("torch.")
            raise ArtifactError(
                f"{folder / TENSOR_FILE}: tensor {name!r} has dtype {_dtype_name(tensor)}, expected {expected}"
            )


def _check_replaceable(folder: Path) -> None:
    if folder.is_dir():
        others = sorted(entry.name for entry in folder.iterdir() if entry.name not in (JSON_FILE, TENSOR_FILE))
        if others:
            raise ArtifactError(
                f"{folder}: holds {others[0]}, which is no part of an artifact", hint="give another folder"
            )
    elif folder.exists():
        raise ArtifactError(f"{folder}: is a file", hint="give another folder")


def _is_version(value: object) -> bool:
    return type(value) is int and value >= 1


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
