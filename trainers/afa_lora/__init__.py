"""AFA-LoRA (arXiv 2512.22455): low-rank adapters with an activation between A and B that is annealed away.

    y = W x + (alpha / r) · B h,    h = z + β (σ(z) − z),    z = A dropout(x)

σ is ReLU, SiLU or GELU. β falls from 1 to 0 while the adapter learns, so that what began as a two-layer network ends as
plain LoRA, which merges. Stock PEFT holds the adapter throughout; what is annealed hangs on its layers as a variant.

The abstract gives the activation and its place. The schedule's default, β = 0 after 30 % of the steps, is a third
party's reading of the paper; the formula above and the rest after the anneal are choices made here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effpass.trainers.afa_lora.adapter import AfaLora, attach
    from effpass.trainers.afa_lora.lora import LoraSettings, add_lora
    from effpass.trainers.afa_lora.schedule import AnnealSchedule

_HOME = {
    "AfaLora": "adapter",
    "AnnealSchedule": "schedule",
    "LoraSettings": "lora",
    "add_lora": "lora",
    "attach": "adapter",
}

__all__ = ["AfaLora", "AnnealSchedule", "LoraSettings", "add_lora", "attach"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
