"""Lookup of the GPU kernels of an operator."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

__all__ = ["triton_kernels"]


@functools.cache
def triton_kernels(name: str) -> ModuleType | None:
    """Return the module `effpass.lowering.kernels.<name>`, or None without Triton, in which case references run."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"effpass.lowering.kernels.{name}")
