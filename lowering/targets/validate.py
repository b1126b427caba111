"""Open an exported file, and check one later, without the model that it came from.

A file keeps what the rewritten model answered to the cases of its first check
(:mod:`effpass.lowering.targets.manifest`). Checked again, it must be unaltered to the bit, and compute those answers on
the machine at hand.
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
from effpass.lowering.targets.decode_graph import CPU, Step
from effpass.lowering.targets.gpu import check_gpu, device_here
from effpass.lowering.targets.limits import Limits, limited
from effpass.lowering.targets.manifest import Manifest, unseal
from effpass.lowering.targets.target import Target, target_of_file
from effpass.lowering.targets.validation import record_step

__all__ = ["CaseError", "Validation", "open_exported", "validate_file"]

# Of CPU capabilities that PyTorch names; code for one runs on those after it.
_CPUS = ("DEFAULT", "AVX2", "AVX512")


@dataclass(frozen=True)
class CaseError:
    """One case, run again: the largest difference of the kept logits, and what it may be."""

    case: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is within tolerance; a NaN is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Validation:
    """What :func:`validate_file` found in an unaltered file.

    Attributes:
        path: the file.
        target: its kind.
        version: of the effpass that wrote it.
        recipe: the recipe's text; empty where there was none.
        executed: whether the file was run now; engines are not.
        cases: the cases run; empty when none was.
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
    """The file as a function that refuses sizes outside its range, and what it says about itself.

    Its tensors are on the CPU, or on PyTorch's current GPU where it was exported on one.

    Args:
        path: what an export wrote.
        allow_native: run machine code from the file; needed for native formats.

    Raises:
        ExportError: not an exported file, altered, of a kind that is not run here, for a device that is not here, or
            native and not allowed.
    """
    target, manifest = _read(path)
    if not target.executes:
        target.load(path, CPU)  # says why not
    step, device = _load(target, path, manifest, allow_native)
    return limited(step, manifest.layers, manifest.dtype, manifest.limits, path.name, device), manifest


def validate_file(
    path: Path, *, allow_native: bool = False, progress: Callable[[str], None] | None = None
) -> Validation:
    """Check an exported file: unaltered, and right on this machine.

    Args:
        path: what an export wrote.
        allow_native: run machine code from the file; needed for native formats.
        progress: called with one line at the start of each step.

    Returns:
        The differences by case; see :attr:`Validation.ok`. An engine is read, not run.

    Raises:
        ExportError: not an exported file, truncated, altered, or native and not allowed.
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
    """The file as a function, and the device of this machine that it runs on."""
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
