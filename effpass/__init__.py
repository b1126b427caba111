"""effpass: PyTorch compiler passes that make a language model faster, smaller, or able to handle longer contexts.

Public names are imported on first use, so that ``import effpass`` takes far less than a second: torch is imported with
the first name that needs it, transformers and other libraries with the first call that does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effpass.api import (
        custom_generate,
        export,
        generate,
        inspect,
        load_exported,
        load_model,
        optimize,
        prepare,
        refresh,
        swap_adapter,
        validate,
    )
    from effpass.core.artifact import Artifact
    from effpass.core.pass_ import GraphPass, Match, NoOptions, Pass, RuntimePass, WeightsPass
    from effpass.core.program import Program
    from effpass.core.recipe import Recipe
    from effpass.core.report import Refusal, Report

__version__ = "0.1.0"

_HOME = {
    "custom_generate": "effpass.api",
    "prepare": "effpass.api",
    "optimize": "effpass.api",
    "export": "effpass.api",
    "generate": "effpass.api",
    "load_exported": "effpass.api",
    "load_model": "effpass.api",
    "inspect": "effpass.api",
    "refresh": "effpass.api",
    "swap_adapter": "effpass.api",
    "validate": "effpass.api",
    "Recipe": "effpass.core.recipe",
    "Artifact": "effpass.core.artifact",
    "Program": "effpass.core.program",
    "Pass": "effpass.core.pass_",
    "GraphPass": "effpass.core.pass_",
    "WeightsPass": "effpass.core.pass_",
    "RuntimePass": "effpass.core.pass_",
    "NoOptions": "effpass.core.pass_",
    "Match": "effpass.core.pass_",
    "Refusal": "effpass.core.report",
    "Report": "effpass.core.report",
}

__all__ = [
    "Artifact",
    "GraphPass",
    "Match",
    "NoOptions",
    "Pass",
    "Program",
    "Recipe",
    "Refusal",
    "Report",
    "RuntimePass",
    "WeightsPass",
    "__version__",
    "custom_generate",
    "export",
    "generate",
    "inspect",
    "load_exported",
    "load_model",
    "optimize",
    "prepare",
    "refresh",
    "swap_adapter",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'effpass' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
