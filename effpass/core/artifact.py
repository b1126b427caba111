"""An artifact: data that was learned for a pass from a particular model, stored in a folder of two files.

``effpass.json``
    The pass and the version of its artifacts, the options of the training or calibration, the fingerprint of the model
    (:mod:`effpass.core.fingerprint`), provenance, metrics, and name, shape and dtype of every tensor.
``effpass.safetensors``
    The tensors. Nothing is ever unpickled.

The commands of ``effpass train`` and ``effpass calibrate`` write artifacts, and passes load them. Every check of the
files is done before a tensor is returned, and a folder is written atomically.
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

__all__ = ["Artifact", "TensorSpec", "check_replaceable", "read_safetensors"]

JSON_FILE = "effpass.json"
TENSOR_FILE = "effpass.safetensors"

# Version of the layout of the two files, which is independent of the version of a pass's artifacts.
_LAYOUT = 1
_MAX_JSON = 16 << 20
_KEYS = ("effpass", "pass", "version", "options", "fingerprint", "provenance", "metrics", "tensors")

# (shape, dtype); None accepts any.
TensorSpec = tuple[tuple[int, ...] | None, torch.dtype | None]


@dataclass(frozen=True, eq=False)
class Artifact:
    """Data that was learned for one pass and one model.

    Attributes:
        pass_name: registry key of the pass.
        version: version of the contents, which each pass counts for its own artifacts, starting at 1.
        options: options that the artifact was learned with, as JSON types.
        fingerprint: identity of the model that the artifact was learned for.
        provenance: origin of the artifact, such as data, seed, versions and commit, as JSON types.
        metrics: measured quality, as JSON types.
        tensors: tensor name → tensor, on the CPU.
    """

    pass_name: str
    version: int
    options: dict[str, Any]
    fingerprint: Fingerprint
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the artifact to `folder` atomically, replacing an artifact that exists there.

        Raises:
            ArtifactError: `folder` is a file or contains other files, or the artifact can't be written as JSON and
                safetensors.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        folder = Path(folder).resolve()  # a link to a folder stays a link
        check_replaceable(folder)
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
        """Load the artifact in `folder`.

        Args:
            folder: folder that :meth:`save` wrote.
            expect_pass: registry key of the pass that loads the artifact.
            max_version: newest version of its artifacts that this pass can read.
            expect_tensors: exact set of the tensors that must be present, with shape and dtype where they are known;
                None accepts those that ``effpass.json`` lists.

        Raises:
            ArtifactError: a file is missing or damaged, the artifact belongs to another pass or is too new, or a tensor
                is missing, unknown, or of another shape or dtype. The message names the difference.
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
        """Check that the artifact was learned for `model`, up to a change of dtype.

        To use an artifact with other weights of the same architecture on purpose, set `weights` of the fingerprint in
        ``effpass.json`` to ``"any"``.

        Raises:
            ArtifactError: the architecture or the weights differ. The message names the difference.
        """
        self.fingerprint.check(model)


def _read_description(folder: Path) -> dict[str, Any]:
    """The contents of ``effpass.json``, with keys and types checked."""
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


def check_replaceable(folder: Path) -> None:
    """Raise an :class:`ArtifactError` if `folder` is a file, or holds files that are no part of an artifact."""
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
