"""Loading of exported files, and checking them again without the model that they were exported from.

A file stores reference logits of the rewritten model for the test cases of its first check
(:mod:`effpass.lowering.targets.manifest`). :func:`validate_file`, which ``effpass validate`` calls, verifies that the
file is bit-identical to what was exported, and that it reproduces these logits within tolerance on the current machine.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from effpass.core.errors import ExportError
from effpass.lowering.targets.decode_graph import Step
from effpass.lowering.targets.device import CPU
from effpass.lowering.targets.gpu import check_gpu, device_here
from effpass.lowering.targets.limits import Limits, limited
from effpass.lowering.targets.manifest import Manifest, unseal
from effpass.lowering.targets.target import Target, target_of_file
from effpass.lowering.targets.validation import record_step

__all__ = ["CaseError", "Validation", "open_exported", "validate_file"]

# CPU capabilities by PyTorch's names, in ascending order; code for one also runs on those after it.
_CPUS = ("DEFAULT", "AVX2", "AVX512")


@dataclass(frozen=True)
class CaseError:
    """Result of one test case: the largest difference from the stored reference logits, and the allowed difference."""

    case: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is within tolerance; a NaN is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Validation:
    """Result of :func:`validate_file` for an unaltered file.

    Attributes:
        path: path of the file.
        target: name of the target.
        version: version of effpass that wrote the file.
        recipe: text of the recipe; empty if there was none.
        executed: whether the file was executed now; TensorRT engines are not.
        cases: results of the test cases; empty if the file was not executed.
    """

    path: Path
    target: str
    version: str
    recipe: str
    executed: bool
    cases: list[CaseError]

    @property
    def ok(self) -> bool:
        return all(case.ok for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        cases = [{**asdict(case), "ok": case.ok} for case in self.cases]
        return {**asdict(self), "path": str(self.path), "cases": cases, "ok": self.ok}


def open_exported(path: Path, *, allow_native: bool = False) -> tuple[Step, Manifest]:
    """Load a file as a function that checks the sizes of its inputs, and return it with the file's manifest.

    Inputs and outputs are on the CPU, or on PyTorch's current GPU if the file was exported on a GPU.

    Args:
        path: path of the exported file.
        allow_native: whether machine code from the file may be executed, which native formats need.

    Raises:
        ExportError: if the file is not an exported one, was altered, is of a format that effpass does not run, needs a
            device that this machine lacks, or is native and not allowed.
    """
    target, manifest = _read(path)
    if not target.executes:
        target.load(path, CPU)  # raises an error with the reason
    step, device = _load(target, path, manifest, allow_native)
    return limited(step, manifest.layers, manifest.dtype, manifest.limits, path.name, device), manifest


def validate_file(
    path: Path, *, allow_native: bool = False, progress: Callable[[str], None] | None = None
) -> Validation:
    """Check that an exported file is unaltered, and that it computes its reference logits on this machine.

    Args:
        path: path of the exported file.
        allow_native: whether machine code from the file may be executed, which native formats need.
        progress: function that is called with one line at the start of each step; None for no progress.

    Returns:
        The differences per test case; see :attr:`Validation.ok`. TensorRT engines are only read, not executed.

    Raises:
        ExportError: if the file is not an exported one, is truncated, was altered, needs a device that this machine
            lacks, or is native and not allowed.
    """
    say = progress or (lambda line: None)
    say("reading the file")
    target, manifest = _read(path)
    cases: list[CaseError] = []
    if target.executes:
        say(f"running it with {target.checked_by}")
        loaded, device = _load(target, path, manifest, allow_native)
        step = limited(loaded, manifest.layers, manifest.dtype, Limits(), path.name, device)
        for reference, tolerance in zip(manifest.reference, manifest.tolerance.logits, strict=True):
            case = reference.case
            (recording,) = record_step(step, manifest.layers, manifest.dtype, [case], device)
            last = case.attention_mask.sum(1).cumsum(0) - 1
            differences = (recording.logits[last].gather(1, reference.picked) - reference.logits).abs()
            error = math.nan if bool(differences.isnan().any()) else float(differences.max())
            cases.append(CaseError(case.name, error, tolerance))
    return Validation(path, target.name, manifest.version, manifest.recipe, target.executes, cases)


def _read(path: Path) -> tuple[Target, Manifest]:
    target = target_of_file(path)
    metadata = target.read(path)
    manifest = unseal(metadata, target.digest(path), str(path))
    if manifest.target != target.name:
        raise ExportError(f"{path} was exported for {manifest.target}, but ends in {path.suffix}")
    return target, manifest


def _load(target: Target, path: Path, manifest: Manifest, allow_native: bool) -> tuple[Step, torch.device]:
    """Load a file as a function without size checks, and return it with the device of this machine that it runs on."""
    _check_allowed(target, path, allow_native)
    device = device_here(manifest.device, str(path))
    if target.native:
        _check_cpu(path, manifest.machine)
        if device != CPU:
            check_gpu(manifest.machine, device, str(path))
    return target.load(path, device), device


def _check_allowed(target: Target, path: Path, allowed: bool) -> None:
    if target.native and not allowed:
        raise ExportError(
            f"{path} holds native code for {target.name}, and to load it is to run it",
            hint="if you trust where it comes from, pass allow_native=True (--allow-native)",
        )


def _check_cpu(path: Path, made: Mapping[str, str]) -> None:
    here = {"system": platform.system(), "machine": platform.machine()}
    cpu, ours = made.get("cpu", ""), torch.backends.cpu.get_cpu_capability()
    other = [f"{made[k]} instead of {v}" for k, v in here.items() if made.get(k, v) != v]
    if cpu != ours and not (cpu in _CPUS and ours in _CPUS and _CPUS.index(cpu) < _CPUS.index(ours)):
        other.append(f"CPUs with {cpu} instead of {ours}")
    if other:
        raise ExportError(f"{path} was made for {' and '.join(other)}", hint="export it again on this machine")
