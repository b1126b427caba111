"""The interface of an export target: one file format that a rewritten decode graph can be written to.

A :class:`Target` knows how to write, load, stamp and hash files of its format, and nothing else. Exporting
(:mod:`effpass.lowering.targets.export`) and checking an exported file later
(:mod:`effpass.lowering.targets.validate`) are shared by all targets and call them through this interface.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch

from effpass.core.errors import ExportError, did_you_mean
from effpass.lowering.targets.decode_graph import DecodeGraph, Step
from effpass.lowering.targets.device import CPU
from effpass.lowering.targets.limits import Limits, model_length

__all__ = ["TARGETS", "Target", "compile_error", "find_target", "first_words", "target_of_file"]

# Target name → module and class. Modules are imported on first use, since they have optional dependencies.
TARGETS = {
    "inductor": ("effpass.lowering.targets.inductor", "InductorTarget"),
    "aoti": ("effpass.lowering.targets.aoti", "AotiTarget"),
    "onnx": ("effpass.lowering.targets.onnx", "OnnxTarget"),
    "tensorrt": ("effpass.lowering.targets.tensorrt", "TensorRTTarget"),
}


class Target(ABC):
    """Abstract base class of one file format.

    Class attributes:
        name: name of the target in recipes and on the command line.
        suffix: file name suffix of its files, with the dot.
        packages: importable packages that must be installed to write a file.
        extra: optional dependency group of effpass that installs `packages`.
        dtypes: dtypes of the models that a file can hold.
        devices: types of the devices that a model may be on; a file runs on the type that it was exported from.
        native: whether loading a file executes machine code from it.
        executes: whether the check executes the file itself; if not, :attr:`checked_by` names what is executed instead.
        checked_by: description of what the check executes, for messages.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float16, torch.bfloat16)
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    native: ClassVar[bool] = False
    executes: ClassVar[bool] = True
    checked_by: ClassVar[str]

    # -- writing ----------------------------------------------------------------------------------------------------

    def require(self, device: str = "cpu") -> None:
        """Raise an :class:`ExportError` if this machine lacks something that the export needs.

        Args:
            device: type of the device that the model is on, such as ``"cuda"``.
        """
        if device not in self.devices:
            raise ExportError(
                f"{self.name} files are written from a model on {' or '.join(self.devices)}, not on {device}",
                hint="move the model: model.to('cpu') (--device cpu)",
            )
        self.require_installed(device)

    def require_installed(self, device: str) -> None:
        """Check installed packages and compilers; the part of :meth:`require` that targets override."""
        missing = [name for name in self.packages if find_spec(name) is None]
        if missing:
            raise ExportError(
                f"exporting to {self.name} needs {' and '.join(missing)}, not installed here",
                hint=f"pip install 'effpass[{self.extra}]'",
            )

    def limits(self, model: Any, max_batch: int | None, max_length: int | None) -> Limits:
        """Return the sizes that a file of `model` will accept: the requested ones, or else those of the model."""
        return Limits(max_batch, max_length or model_length(model))

    @abstractmethod
    def memory(self, dtype: torch.dtype) -> float:
        """Return the peak host memory of an export as a multiple of the weights' size (docs/targets.md).

        The multiple includes the model's own weights.
        """

    @abstractmethod
    def write(self, graph: DecodeGraph, file: Path, limits: Limits) -> Limits:
        """Write a file that the check can execute: the exported file or, where it is not executed, its source.

        Args:
            graph: the rewritten graph.
            file: path in a temporary folder, which is deleted if any later step fails.
            limits: the sizes that the file must accept.

        Returns:
            The sizes that the file accepts: `limits`, extended by the tensors that its kernels index with 32 bits.

        Raises:
            ExportError: if the format can't represent the graph.
            OSError: if the file does not fit on the disk.
        """

    def load_written(self, file: Path, device: torch.device) -> Step:
        """Load what :meth:`write` wrote as a function to check; by default the same as :meth:`load`."""
        return self.load(file, device)

    def finish(self, file: Path, limits: Limits) -> None:  # noqa: B027 (most formats are finished when written)
        """Complete the file after the check has passed."""

    @abstractmethod
    def stamp(self, file: Path, metadata: Mapping[str, str]) -> None:
        """Store `metadata` in the file, or in a file next to it where the format has no place for it."""

    def machine(self, device: torch.device = CPU) -> dict[str, str]:
        """Return what a file requires of the machine that runs it; empty if files contain no native code."""
        return {}

    # -- reading ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def load(self, file: Path, device: torch.device) -> Step:
        """Load a file as a function ``(input_ids, attention_mask, position_ids, *past) -> outputs``.

        The function takes contiguous tensors and checks nothing; see :func:`effpass.lowering.targets.limits.limited`.

        Args:
            file: a file of this format.
            device: device to run on.

        Raises:
            ExportError: if the file can't be run on this machine.
        """

    @abstractmethod
    def read(self, file: Path) -> dict[str, str]:
        """Read the metadata that :meth:`stamp` stored, without executing anything from the file.

        Raises:
            ExportError: if the file is not of this format, or is truncated.
        """

    @abstractmethod
    def digest(self, file: Path) -> str:
        """Return the SHA-256 of the file's contents, excluding the metadata that effpass stored in it."""

    def beside(self, file: Path) -> list[Path]:
        """Return the paths of companion files next to `file`, such as external weights, whether they exist or not."""
        return []


def find_target(name: str) -> Target:
    """Return the target of this name, with default settings.

    Raises:
        ExportError: if there is no such target.
    """
    if name not in TARGETS:
        raise ExportError(
            f"unknown target {name!r}{did_you_mean(name, TARGETS)}", hint=f"targets: {', '.join(TARGETS)}"
        )
    module, cls = TARGETS[name]
    return getattr(importlib.import_module(module), cls)()


def target_of_file(path: Path) -> Target:
    """Return the target whose files have the suffix of `path`.

    Raises:
        ExportError: if no target has this suffix, or `path` is no existing file.
    """
    targets = {target.suffix: target for target in map(find_target, TARGETS)}
    if path.suffix not in targets:
        raise ExportError(
            f"{path} ends in {path.suffix or 'nothing'}, which is no exported file's",
            hint="exported files end in " + ", ".join(f"{s} ({t.name})" for s, t in targets.items()),
        )
    if not path.is_file():
        raise ExportError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    return targets[path.suffix]


def compile_error(compiler: str, error: Exception) -> ExportError:
    """Wrap an exception that a compiler raised into an :class:`ExportError` of one sentence."""
    return ExportError(
        f"{compiler} can't compile the decode graph: {first_words(error)}",
        hint="`effpass --debug export ...` shows where; export to ONNX goes without a compiler",
    )


def first_words(error: Exception) -> str:
    """Return the type and the first 300 characters of an error's message, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
