"""Training code: the optimizer :class:`MONA`, and trainers that produce checkpoints, adapters and artifacts.

An *artifact* is a folder with data that was learned for a pass (:mod:`effpass.core.artifact`). Each subpackage belongs
to one kind of training; the commands of `effpass train` call them. `MONA` is imported on first use, so that importing
this package does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effpass.trainers.mona import MONA

_HOME = {"MONA": "effpass.trainers.mona"}

__all__ = ["MONA"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'effpass.trainers' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
