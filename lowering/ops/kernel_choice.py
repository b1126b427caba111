"""Where an operator finds its GPU kernels."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

__all__ = ["triton_kernels"]


@functools.cache
def triton_kernels(name: str) -> ModuleType | None:
    """The module `effpass.lowering.kernels.<name>`; None where Triton is not installed: references run then."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"effpass.lowering.kernels.{name}")
