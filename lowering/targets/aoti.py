"""The AOTInductor target: the decode graph as native code for this machine's CPU or GPU, in a ``.pt2`` package.

The package is a zip archive with a shared library that holds code and weights. It also runs without Python
(``AOTIModelPackageLoader``). Loading a package executes code from it. The library checks neither sizes nor strides of
its inputs; :func:`effpass.load_exported` does.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch

from effpass.core.errors import ExportError
from effpass.lowering.targets import zip_file
from effpass.lowering.targets.assumptions import any_size
from effpass.lowering.targets.decode_graph import DecodeGraph, Step
from effpass.lowering.targets.device import CPU, DEVICES
from effpass.lowering.targets.gpu import describe_gpu
from effpass.lowering.targets.limits import Limits
from effpass.lowering.targets.target import Target, compile_error, first_words
from effpass.lowering.targets.tolerance import require_cpp_compiler, require_shared_cpp_runtime, require_triton
from effpass.lowering.targets.tracing import plain_attention

__all__ = ["AotiTarget"]

# Append the weights to the library and map them from there. Below 2 GB, Inductor's default is to assemble them into the
# library, which needs one more copy of them in memory.
_WEIGHTS_APPENDED = {"aot_inductor.force_mmap_weights": True}


class AotiTarget(Target):
    """Writes AOTInductor packages; see the module docstring."""

    name: ClassVar[str] = "aoti"
    suffix: ClassVar[str] = ".pt2"
    devices: ClassVar[tuple[str, ...]] = DEVICES
    native: ClassVar[bool] = True
    checked_by: ClassVar[str] = "AOTInductor's runtime"

    def require_installed(self, device: str) -> None:
        require_cpp_compiler(self.name)  # for a GPU too: the code that launches its kernels is C++
        require_shared_cpp_runtime(self.name)
        require_triton(self.name, device)

    def machine(self, device: torch.device = CPU) -> dict[str, str]:
        host = {
            "system": platform.system(),
            "machine": platform.machine(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__.split("+")[0],
        }
        return host if device.type == "cpu" else host | describe_gpu(device)

    def memory(self, dtype: torch.dtype) -> float:
        return 2.3

    def write(self, graph: DecodeGraph, file: Path, limits: Limits) -> Limits:
        try:
            with any_size(graph.program, "AOTInductor") as indices, plain_attention(graph.device):
                torch._inductor.aoti_compile_and_package(
                    graph.program, package_path=str(file), inductor_configs=_WEIGHTS_APPENDED
                )
        except (ExportError, OSError):
            raise
        except Exception as error:  # Inductor raises exceptions of any type
            raise compile_error("AOTInductor", error) from error
        return replace(limits, indices=tuple(indices))

    def load(self, file: Path, device: torch.device) -> Step:
        # On a GPU the package synchronizes several threads with events, which can't be captured in a CUDA graph.
        one_thread = device.type != "cpu"
        try:
            return torch._inductor.aoti_load_package(
                str(file), run_single_threaded=one_thread, device_index=-1 if device.index is None else device.index
            )
        except Exception as error:  # the loader does too
            raise ExportError(f"AOTInductor's runtime can't load {file.name}: {first_words(error)}") from error

    def stamp(self, file: Path, metadata: Mapping[str, str]) -> None:
        zip_file.stamp(file, metadata)

    def read(self, file: Path) -> dict[str, str]:
        return zip_file.read(file)

    def digest(self, file: Path) -> str:
        return zip_file.digest(file)
