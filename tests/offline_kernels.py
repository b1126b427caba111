"""Compiles Triton kernels for a GPU that is not there, which finds what the interpreter lets pass."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

__all__ = ["compile_instead"]


def compile_instead(modules: Iterable[ModuleType], kernels: Iterable[str]) -> list[tuple[str, int]]:
    """From here on launches of `kernels` in `modules` are compiled for compute capability 9.0, and not run.

    Returns:
        A list that grows: module and kernel, and the bytes of shared memory, of every launch.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class NoDevice:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

    class Compiled:
        def __init__(self, name: str, function: Any) -> None:
            self.name, self.function = name, function

        def __getitem__(self, grid: Any) -> Any:
            def run(*args: Any, **options: Any) -> None:
                kernel = self.function.warmup(*args, grid=grid, **options)
                launches.append((self.name, kernel.metadata.shared))

            return run

    driver.set_active(NoDevice())
    launches: list[tuple[str, int]] = []
    for module in modules:
        for name in kernels:
            if hasattr(module, name):
                label = f"{module.__name__.rpartition('.')[2]}.{name}"
                setattr(module, name, Compiled(label, getattr(module, name)))
        for name, value in (("multiprocessors", 132), ("overlaps", True)):
            if hasattr(module, name):
                setattr(module, name, lambda device, value=value: value)
    return launches
