"""What a target is: where a rewritten decode graph goes, as a file that can be loaded and checked.

A target knows one file format. The road to the file (:mod:`effpass.lowering.targets.export`) and the check of a file
later (:mod:`effpass.lowering.targets.validate`) are the same for all.
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
from effpass.lowering.targets.decode_graph import CPU, DecodeGraph, Step
from effpass.lowering.targets.limits import Limits, model_length

__all__ = ["TARGETS", "Target", "compile_error", "find_target", "first_words", "target_of_file"]

# Name → module and class. Imported when asked for.
TARGETS = {
    "inductor": ("effpass.lowering.targets.inductor", "InductorTarget"),
    "aoti": ("effpass.lowering.targets.aoti", "AotiTarget"),
    "onnx": ("effpass.lowering.targets.onnx", "OnnxTarget"),
    "tensorrt": ("effpass.lowering.targets.tensorrt", "TensorRTTarget"),
}


class Target(ABC):
    """One file format.

    Class attributes:
        name: what recipes and the command line call it.
        suffix: of its files.
        packages: what must be installed to write one.
        extra: the extra of effpass that installs them.
        dtypes: of the models that it can hold.
        devices: that a model may be on; its files run there.
        native: whether loading a file runs machine code from it.
        executes: whether the file itself is run when it is checked; :attr:`checked_by` says what is.
        checked_by: what runs, for messages.
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
        """Raise an :class:`ExportError` when something that the export needs is missing on this machine.

        Args:
            device: type of the device that the model is on.
        """
        if device not in self.devices:
            raise ExportError(
                f"{self.name} files are written from a model on {' or '.join(self.devices)}, not on {device}",
                hint="move the model: model.to('cpu') (--device cpu)",
            )
        self.require_installed(device)

    def require_installed(self, device: str) -> None:
        """The part of :meth:`require` that a target may have its own of."""
        missing = [name for name in self.packages if find_spec(name) is None]
        if missing:
            raise ExportError(
                f"exporting to {self.name} needs {' and '.join(missing)}, not installed here",
                hint=f"pip install 'effpass[{self.extra}]'",
            )

    def limits(self, model: Any, max_batch: int | None, max_length: int | None) -> Limits:
        """The sizes that a file of `model` will take: what was asked for, within what the model holds."""
        return Limits(max_batch, max_length or model_length(model))

    @abstractmethod
    def memory(self, dtype: torch.dtype) -> float:
        """Host memory of an export as a multiple of the weights, the model's own included (docs/targets.md)."""

    @abstractmethod
    def write(self, graph: DecodeGraph, file: Path, limits: Limits) -> Limits:
        """Write what can be checked by running it.

        Args:
            graph: the rewritten graph.
            file: in a folder of its own, which is thrown away when anything fails.
            limits: the sizes that it must take.

        Returns:
            The sizes that it takes: `limits`, and those under which its indices hold.

        Raises:
            ExportError: the target can't hold the graph.
            OSError: the disk can't hold the file.
        """

    def load_written(self, file: Path, device: torch.device) -> Step:
        """What :meth:`write` wrote, as a function to check. The default is :meth:`load`."""
        return self.load(file, device)

    def finish(self, file: Path, limits: Limits) -> None:  # noqa: B027 (most formats are finished when written)
        """Complete the file after its check."""

    @abstractmethod
    def stamp(self, file: Path, metadata: Mapping[str, str]) -> None:
        """Put `metadata` into the file."""

    def machine(self, device: torch.device = CPU) -> dict[str, str]:
        """What the files need of the machine that runs them; empty when they hold no native code."""
        return {}

    # -- reading ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def load(self, file: Path, device: torch.device) -> Step:
        """The file, a function of contiguous tensors, ``(input_ids, attention_mask, position_ids, *past) -> outputs``.

        Args:
            file: what :meth:`write` wrote.
            device: that it is for.

        Raises:
            ExportError: the file can't be run here.
        """

    @abstractmethod
    def read(self, file: Path) -> dict[str, str]:
        """The metadata that :meth:`stamp` wrote; runs nothing from the file.

        Raises:
            ExportError: the file is not of this format, or truncated.
        """

    @abstractmethod
    def digest(self, file: Path) -> str:
        """SHA-256 of all that the file says, metadata of effpass apart."""

    def beside(self, file: Path) -> list[Path]:
        """Files that belong to `file` and stand beside it, there or not."""
        return []


def find_target(name: str) -> Target:
    """The target of this name, with its default settings.

    Raises:
        ExportError: no such target.
    """
    if name not in TARGETS:
        raise ExportError(
            f"unknown target {name!r}{did_you_mean(name, TARGETS)}", hint=f"targets: {', '.join(TARGETS)}"
        )
    module, cls = TARGETS[name]
    return getattr(importlib.import_module(module), cls)()


def target_of_file(path: Path) -> Target:
    """The target that writes files with the suffix of `path`.

    Raises:
        ExportError: none does, or there is no such file.
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
    """What a compiler raised, in one sentence."""
    return ExportError(
        f"{compiler} can't compile the decode graph: {first_words(error)}",
        hint="`effpass --debug export ...` shows where; export to ONNX goes without a compiler",
    )


def first_words(error: Exception) -> str:
    """Type and beginning of an error's message, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
